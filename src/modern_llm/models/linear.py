"""Linear layers: one matrix, or one a group of rows (experts)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

Factory = Callable[..., nn.Module]  # (in, out, *, bias, residual) -> linear layer


class Linear(nn.Linear):
    """``x W^T + b``; ``residual`` marks a projection that adds to the residual stream."""

    def __init__(self, width_in: int, width_out: int, *, bias: bool, residual: bool = False):
        super().__init__(width_in, width_out, bias=bias)
        self.residual = residual

    def reset_parameters(self) -> None:
        """Leave the memory as it is: `initialize` fills it."""

    def flops(self) -> float:
        """Forward FLOPs of one row."""
        return 2.0 * self.in_features * self.out_features


class GroupedLinear(nn.Module):
    """One linear layer a group: rows come sorted by group, ``counts`` says how many each has.

    Args:
        n_groups: experts (E).
        width_in: columns in.
        width_out: columns out.
        bias: whether each group has an offset.
        residual: as in `Linear`.
    """

    def __init__(
        self, n_groups: int, width_in: int, width_out: int, *, bias: bool, residual: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_groups, width_out, width_in))
        self.bias = nn.Parameter(torch.empty(n_groups, width_out)) if bias else None
        self.residual = residual

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """``(M, in)`` -> ``(M, out)``; ``counts_E`` (int64, sum M) are the rows of each group."""
        device = x_MD.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = self.weight.dtype
        y_MF: Tensor = grouped_linear(x_MD.to(dtype), self.weight.to(dtype), counts_E)
        if self.bias is not None:
            group_M = torch.repeat_interleave(counts_E, output_size=x_MD.shape[0])
            y_MF = y_MF + self.bias.to(dtype)[group_M]
        return y_MF

    def flops(self) -> float:
        """Forward FLOPs of one row."""
        return 2.0 * self.weight[0].numel()


# An operator of its own: its row counts are data, and a compiled graph must not look inside.
@torch.library.custom_op("modern_llm::grouped_linear", mutates_args=())
def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of group ``e`` times ``weight_EFD[e]`` transposed: ``(M, F)``."""
    y_MF = x_MD.new_empty(x_MD.shape[0], weight_EFD.shape[1])
    counts = counts_E.tolist()
    rows = zip(torch.split(x_MD, counts), torch.split(y_MF, counts), strict=True)
    for (x, y), weight in zip(rows, weight_EFD, strict=True):
        torch.mm(x, weight.t(), out=y)
    return y_MF


@grouped_linear.register_fake
def _(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return x_MD.new_empty(x_MD.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("modern_llm::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad_MF: Tensor, x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_linear` for ``x_MD`` and ``weight_EFD``."""
    grad_x_MD, grad_weight_EFD = torch.empty_like(x_MD), torch.empty_like(weight_EFD)
    counts = counts_E.tolist()
    rows = zip(*(torch.split(t, counts) for t in (grad_MF, x_MD, grad_x_MD)), strict=True)
    for (grad, x, grad_x), weight, grad_weight in zip(
        rows, weight_EFD, grad_weight_EFD, strict=True
    ):
        torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.t(), x, out=grad_weight)
    return grad_x_MD, grad_weight_EFD


@grouped_linear_backward.register_fake
def _(grad_MF: Tensor, x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_MD), torch.empty_like(weight_EFD)


def _save(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_MF: Tensor
) -> tuple[Tensor | None, ...]:
    grads = grouped_linear_backward(grad_MF.contiguous(), *ctx.saved_tensors)  # type: ignore[attr-defined]
    return *grads, None


grouped_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.modern_llm.grouped_linear)
def _flops(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *args: object, **kwargs: object
) -> int:
    return 2 * math.prod(x_shape) * weight_shape[1]


@register_flop_formula(torch.ops.modern_llm.grouped_linear_backward)
def _backward_flops(
    grad_shape: tuple[int, ...], x_shape: tuple[int, ...], *args: object, **kwargs: object
) -> int:
    return 4 * math.prod(grad_shape) * x_shape[1]

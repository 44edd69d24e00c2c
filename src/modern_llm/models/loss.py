"""Cross entropy of the head's logits, of all tokens at once or of one chunk after the other."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.models.norms import at_least_float32

IGNORE = -100  # label that adds nothing

ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see `chunk_loss`


def token_loss_sum(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Sum in nats of the cross entropy over labels that are not -100, in float32 or more.

    Args:
        logits_MV: ``(..., V)`` in any floating dtype.
        labels_M: ``(...)`` ids; -100 adds nothing, and a batch of only those gives 0, never NaN.
    """
    return F.cross_entropy(
        at_least_float32(logits_MV.reshape(-1, logits_MV.shape[-1])),
        labels_M.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
    )


def chunk_loss(logits_MV: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """`token_loss_sum`, and its gradient by the logits: ``softmax - onehot``, in their dtype."""
    logprob_MV = F.log_softmax(at_least_float32(logits_MV), -1)
    loss_sum = F.nll_loss(logprob_MV, labels_M, ignore_index=IGNORE, reduction="sum")
    kept_M1 = (labels_M != IGNORE).unsqueeze(1)
    label_M1 = labels_M.unsqueeze(1).clamp(min=0)
    at_label_M1 = torch.expm1(logprob_MV.gather(1, label_M1)) * kept_M1  # p - 1, before rounding
    grad_MV = logprob_MV.exp_().mul_(kept_M1).to(logits_MV.dtype)
    return loss_sum, grad_MV.scatter_(1, label_M1, at_label_M1.to(logits_MV.dtype))


def chunked_loss_sum(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    *,
    chunk: int,
    dtype: torch.dtype,
    chunk_loss: ChunkLoss = chunk_loss,
) -> Tensor:
    """`token_loss_sum` of the logits ``hidden weight^T``, of which only ``chunk`` rows ever stand.

    Nothing is computed twice: the loss is a sum, so its gradient by the logits is known up to a
    factor as soon as they are, and goes at once into those by ``hidden_MD`` and ``weight_VD``,
    which wait for the backward (as FusedLinearCrossEntropy of arXiv:2410.10989 does). The gradient
    of the weight is summed up over chunks in float32 or more.

    Args:
        hidden_MD: what the head reads.
        weight_VD: of the head.
        labels_M: ids, or -100.
        chunk: rows of logits at once; 0: all of them.
        dtype: of the products.
        chunk_loss: `chunk_loss`, or a compiled one.
    """
    chunk = chunk or max(1, len(labels_M))
    wanted = hidden_MD.requires_grad or weight_VD.requires_grad
    if torch.is_grad_enabled() and wanted:
        inputs = (hidden_MD, weight_VD, labels_M, chunk, dtype, chunk_loss)
        return _ChunkedLoss.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    weight_DV = weight_VD.to(dtype).t()
    rows = zip(torch.split(hidden_MD.to(dtype), chunk), torch.split(labels_M, chunk), strict=True)
    return torch.stack([token_loss_sum(part @ weight_DV, labels) for part, labels in rows]).sum()


class _ChunkedLoss(torch.autograd.Function):
    """`chunked_loss_sum` with both gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        labels_M: Tensor,
        chunk: int,
        dtype: torch.dtype,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        low_MD, low_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
        grad_weight_VD = torch.zeros_like(at_least_float32(weight_VD))
        losses, grads_hidden = [], []
        chunks = zip(torch.split(low_MD, chunk), torch.split(labels_M, chunk), strict=True)
        for low_CD, labels_C in chunks:
            loss_sum, grad_CV = chunk_loss(low_CD @ low_VD.t(), labels_C)
            grad_weight_VD += grad_CV.t() @ low_CD
            grads_hidden.append(grad_CV @ low_VD)
            losses.append(loss_sum)
            del grad_CV  # else it stands beside the logits of the next chunk
        ctx.save_for_backward(torch.cat(grads_hidden), grad_weight_VD)
        ctx.dtypes = hidden_MD.dtype, weight_VD.dtype  # type: ignore[attr-defined]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden_MD, grad_weight_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        of_hidden, of_weight = ctx.dtypes  # type: ignore[attr-defined]
        # First to the dtype of the input: a small factor would be lost in float16.
        to_hidden_MD = grad_hidden_MD.to(of_hidden) * grad
        return to_hidden_MD, (grad_weight_VD * grad).to(of_weight), None, None, None, None

"""Optimizers behind one object: built from a model and a config, scaled by the schedule's factor.

Weight decay acts on matrices and embedding tables (two dimensions or more), and on nothing else:
no norm gain, bias or learned sink.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from modern_llm.config import TrainingConfig
from modern_llm.errors import CheckpointError, ConfigError
from modern_llm.registry import Registry

OPTIMIZERS = Registry("optimizer")
Place = Callable[[nn.Parameter, Mapping[str, Any]], dict[str, Any]]
FUSED_DEVICES = ("cpu", "cuda", "mps")


class Optimizers:
    """One or two torch optimizers that step as one.

    Args:
        parts: optimizers over disjoint parameters, with their peak learning rates set.
        names: of their classes, where a part wraps its own.
    """

    def __init__(self, *parts: Optimizer, names: Sequence[str] = ()) -> None:
        self.parts: Sequence[Optimizer] = parts
        self.names = list(names) or [type(part).__name__ for part in parts]
        for group in self.groups():
            group["peak_lr"] = group["lr"]

    def groups(self) -> Iterable[dict[str, Any]]:
        """Parameter groups of all parts."""
        return (group for part in self.parts for group in part.param_groups)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in a fixed order."""
        return [p for group in self.groups() for p in group["params"]]

    def set_factor(self, factor: float) -> None:
        """Set every group's learning rate to its peak times ``factor``."""
        for group in self.groups():
            group["lr"] = group["peak_lr"] * factor

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Update the parameters from their gradients, by way of the fp16 scaler if there is one."""
        for part in self.parts:
            if scaler is None:
                part.step()
            else:
                scaler.step(part)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Moments of each part; hyperparameters come from the config, not from here."""
        return {**self._kind(), "states": [part.state_dict()["state"] for part in self.parts]}

    def _kind(self) -> dict[str, Any]:
        sizes = [[len(g["params"]) for g in part.param_groups] for part in self.parts]
        return {"parts": self.names, "sizes": sizes}

    def load_state_dict(self, state: Mapping[str, Any], *, place: Place | None = None) -> None:
        """Put back moments; learning rate, decay and the like stay as the config says.

        Args:
            state: what `state_dict` returned.
            place: ``(parameter, its moments) -> moments`` where a rank has a part of them.

        Raises:
            CheckpointError: the state is of another optimizer or of other parameters.
        """
        own = self._kind()
        if any(state.get(key) != own[key] for key in ("parts", "sizes")):
            raise CheckpointError(
                f"the optimizer state is of {state.get('parts')} with {state.get('sizes')} "
                f"parameters, this run has {own['parts']} with {own['sizes']}; "
                "use the optimizer that the run began with"
            )
        for part, moments in zip(self.parts, state["states"], strict=True):
            parameters = [p for group in part.param_groups for p in group["params"]]
            if place is not None:
                moments = {i: place(parameters[i], value) for i, value in moments.items()}
            groups = Optimizer.state_dict(part)["param_groups"]  # a sharded one has no other here
            part.load_state_dict({"state": dict(moments), "param_groups": groups})


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Two dimensions or more, and no bias (the biases of experts have two)."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] != "bias"


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """Two groups of the trained parameters: matrices decay, the others do not."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if is_matrix(name, p)], "weight_decay": decay},
        {"params": [p for name, p in trained if not is_matrix(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trained matrices inside the stack of blocks: no embedding, head, norm or bias.

    A parameter is inside the stack when its path goes through an ``nn.ModuleList``. The weights of
    experts are three-dimensional, which `torch.optim.Muon` does not take: they are not among them.
    """
    matrices: dict[int, nn.Parameter] = {}
    for stack in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        for module in stack.modules():
            if isinstance(module, nn.Embedding):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2 and is_matrix(name, parameter) and parameter.requires_grad:
                    matrices[id(parameter)] = parameter
    return list(matrices.values())


@OPTIMIZERS.register("adamw", "adam")
def adamw(model: nn.Module, config: TrainingConfig) -> Optimizers:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101, alg. 2), fused where the device has it."""
    return Optimizers(_adamw(model.named_parameters(), config))


def _adamw(named: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig) -> torch.optim.AdamW:
    groups = decay_groups(named, config.weight_decay)
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=devices <= set(FUSED_DEVICES),
    )


@OPTIMIZERS.register("muon")
def muon(
    model: nn.Module,
    config: TrainingConfig,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    lr_ratio: float = 1.0,
) -> Optimizers:
    """Muon for the hidden matrices, AdamW for all else (Liu et al. 2025, arXiv:2502.16982, alg. 2).

    The update of a matrix (A, B) is orthogonalised and scaled by ``0.2 * sqrt(max(A, B))``, the
    root mean square of AdamW's updates, so that one learning rate and one decay serve both.

    Args:
        model: its matrices inside the stack of blocks go to Muon; see `hidden_matrices`.
        config: learning rate, decay, and AdamW's betas and eps.
        momentum: of the gradient's running mean.
        nesterov: look one step ahead.
        ns_steps: Newton-Schulz iterations.
        lr_ratio: Muon's learning rate over the config's.

    Raises:
        ConfigError: an option out of range.
    """
    problems = [
        told
        for wrong, told in (
            (not 0 <= momentum < 1, f"momentum={momentum} must be in [0, 1)"),
            (not 1 <= ns_steps < 100, f"ns_steps={ns_steps} must be in [1, 100)"),
            (not 0 < lr_ratio < math.inf, f"lr_ratio={lr_ratio} must be positive"),
        )
        if wrong
    ]
    if problems:
        raise ConfigError(f"optimizer 'muon': {'; '.join(problems)}")
    hidden = hidden_matrices(model)
    ids = {id(p) for p in hidden}
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in ids]
    if not hidden:
        return Optimizers(_adamw(rest, config))
    orthogonal = torch.optim.Muon(
        hidden,
        lr=config.lr * lr_ratio,
        weight_decay=config.weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizers(_adamw(rest, config), orthogonal)


def build_optimizers(model: nn.Module, config: TrainingConfig) -> Optimizers:
    """The optimizer that ``config.optimizer`` names, over the trained parameters of ``model``.

    Raises:
        ConfigError: unknown optimizer or option, or an option out of range.
    """
    built = OPTIMIZERS.build(config.optimizer, model, config)
    assert isinstance(built, Optimizers)
    return built

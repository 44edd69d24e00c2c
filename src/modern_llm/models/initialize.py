"""First values of all parameters."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modern_llm.config import ModelConfig
from modern_llm.models.linear import GroupedLinear, Linear
from modern_llm.models.norms import Norm
from modern_llm.models.weights import placed


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig) -> None:
    """Normal(0, ``init_std``) for matrices and embeddings, zero for biases.

    Projections that add to the residual stream are smaller by ``1 / sqrt(2 n_layers)``, so that
    the stream's variance does not grow with depth (GPT-2, sec. 2.3). Draws from torch's global
    generator; norms and sinks keep the values that they were made with.
    """
    residual_std = config.init_std / math.sqrt(2 * config.n_layers)
    for module in model.modules():
        if isinstance(module, Linear | GroupedLinear):
            draw_normal(module.weight, std=residual_std if module.residual else config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            draw_normal(module.weight, std=config.init_std)


def draw_normal(weight: Tensor, *, std: float) -> None:
    """Fill with Normal(0, ``std``); a tensor of which each rank has a part as if it were whole."""
    if weight.is_meta:
        return  # drawn when it has memory
    whole = weight if type(weight) in (Tensor, nn.Parameter) else torch.empty(weight.shape)
    nn.init.normal_(whole, std=std)
    if whole is not weight:
        weight.copy_(placed(whole, weight))


@contextmanager
def without_memory() -> Iterator[None]:
    """Models made inside have their matrices on the meta device, and all else as always."""
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.ndim >= 2:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def initialize_again(model: nn.Module, config: ModelConfig) -> None:
    """Draw what the constructor would have drawn, for a model made `without_memory`.

    Torch's generator must be where the constructor left it: that of `nn.Embedding` draws a table,
    which `initialize` draws again.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(torch.empty(module.weight.shape))
    initialize(model, config)


@torch.no_grad()
def calm_tied_logits(last_norm: Norm, config: ModelConfig) -> None:
    """Scale the last norm's gain so that tied embeddings start with a loss of about ``ln V``.

    At the start the last hidden state still points at the embedding of its own token, whose logit
    is up to ``init_std * d_model`` (7.7 for a width of 384): more than a small vocabulary can
    outweigh. Held to ``ln V - 2`` it adds ``ln(1 + e^-2)`` = 0.13 nats to the first loss at most.
    A smaller gain, or smaller embeddings, would slow the first steps.
    """
    own_logit = config.init_std * config.d_model
    last_norm.weight.mul_(min(1.0, max(1.0, math.log(config.vocab_size) - 2.0) / own_logit))

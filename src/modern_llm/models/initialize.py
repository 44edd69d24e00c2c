"""First values of all parameters."""

import math

import torch
from torch import nn

from modern_llm.config import ModelConfig
from modern_llm.models.linear import GroupedLinear, Linear
from modern_llm.models.norms import Norm


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
            nn.init.normal_(module.weight, std=residual_std if module.residual else config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.init_std)


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

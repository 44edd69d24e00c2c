"""What a stage minimises: sums over units, divided once a step by the Trainer.

A unit is what the mean of a step is taken over: a supervised token, a preference pair, an answer.
Because an objective returns sums, neither the split into micro-batches nor that over ranks can
change the gradient. One term is no such sum: the balance loss of experts is a product of two means
over all tokens of a micro-batch, padding included, so with experts the split changes its part.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from modern_llm.data.collate import IGNORE, TokenBatch
from modern_llm.models.loss import token_loss_sum


@dataclass(frozen=True)
class Terms:
    """Sums over the units of one micro-batch.

    Attributes:
        loss_sum: scalar in nats, with its graph; what is logged, checked and compared.
        metrics: scalars, summed over units too; shown as means.
        aux_sum: what is minimised beside the loss without being part of it.
    """

    loss_sum: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    aux_sum: Tensor | None = None


class Objective(Protocol):
    """Loss of one stage."""

    unit: str  # "token", "pair" or "answer"
    likelihood: bool  # the loss is nats of a token, and its exponential a perplexity

    def units(self, batch: Any) -> int:
        """Units of the batch; may be 0. Called on the CPU, before the batch is moved."""

    def scored(self, batch: Any) -> int:
        """Tokens of the batch at which the head computes; called on the CPU too."""

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        """Loss and metrics of one micro-batch, summed over its units."""


class LMObjective:
    """Next-token cross entropy over the labels of a ``TokenBatch``.

    Args:
        gather: compute logits only at supervised positions; pays when few tokens are supervised
            (SFT). It waits for the device once a micro-batch, so pretraining leaves it off.
        chunk: tokens whose logits stand at once; the model computes the loss then. 0: all, of which
            a loss in float32 is taken here.
        compile: compile the loss; the model is compiled by the Trainer, with its loss of a chunk.
    """

    unit = "token"
    likelihood = True

    def __init__(self, *, gather: bool = False, chunk: int = 0, compile: bool = False) -> None:
        self.gather, self.chunk = gather, chunk
        self._token_loss_sum = torch.compile(token_loss_sum) if compile else token_loss_sum

    def units(self, batch: TokenBatch) -> int:
        """Supervised tokens of the batch."""
        return int((batch.labels_BT != IGNORE).sum())

    def scored(self, batch: TokenBatch) -> int:
        """All tokens, or those that are supervised."""
        return self.units(batch) if self.gather else batch.n_tokens

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Terms:
        """Cross entropy in nats, summed; with experts, their balance and load as metrics."""
        labels = batch.labels_BT
        options = {"doc_ids_BT": batch.doc_ids_BT, "pos_BT": batch.pos_BT}
        if self.gather:
            at_M = (labels.reshape(-1) != IGNORE).nonzero().squeeze(-1)
            labels = labels.reshape(-1)[at_M]
            options["at_M"] = at_M
        if self.chunk:
            loss_sum = model(batch.tokens_BT, labels_M=labels, loss_chunk=self.chunk, **options)
        else:
            loss_sum = self._token_loss_sum(model(batch.tokens_BT, **options), labels)
        return with_balance_loss(model, Terms(loss_sum), (labels != IGNORE).sum())


@runtime_checkable
class HasExperts(Protocol):
    """A decoder, which may have experts."""

    def aux_loss(self) -> Tensor | None:
        """Balance loss of the last forward, with its coefficient; ``None`` without experts."""

    def moe_load(self) -> dict[str, Tensor]:
        """Load of the experts in the last forward."""


def with_balance_loss(model: nn.Module, terms: Terms, units: Tensor | int) -> Terms:
    """Add the experts' balance loss of the last forward as ``aux_sum``, and their loads as metrics.

    The balance loss is one number for a micro-batch; it is weighted by the units of that
    micro-batch, so that its share of the step does not depend on the split.

    Args:
        model: a decoder or a verifier; one without experts leaves the terms as they are.
        terms: of the objective itself.
        units: of the micro-batch.
    """
    # From Python 3.12 on, isinstance does not see what a wrapper passes on to its module.
    model = getattr(model, "module", model)
    aux = model.aux_loss() if isinstance(model, HasExperts) else None
    if aux is None or not isinstance(model, HasExperts):
        return terms
    metrics = {**terms.metrics, "balance_loss": aux.detach() * units}
    for name, value in model.moe_load().items():
        metrics[f"expert_load.{name}"] = value.detach() * units
    return Terms(terms.loss_sum, metrics, aux * units)

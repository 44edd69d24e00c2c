"""One optimizer step: micro-batches, one division, one clipping, one update."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from modern_llm.config import TrainingConfig
from modern_llm.errors import ConfigError, DataError, DivergedError
from modern_llm.models.weights import whole
from modern_llm.runtime.devices import autocast
from modern_llm.runtime.ranks import group
from modern_llm.training.engines import Engine, OneProcess
from modern_llm.training.gradients import gradient_statistics
from modern_llm.training.objectives import Objective, Terms
from modern_llm.training.optim import build_optimizers
from modern_llm.training.records import WAY_OUT, FirstLoss, StepStats
from modern_llm.training.schedule import Schedule

MIN_FP16_SCALE = 2.0**-6  # a gradient that overflows at this scale is not finite at all


class Update:
    """Moves a model's weights by one optimizer step at a time.

    The loss is one mean over every unit of the step on all ranks, so that the split into
    micro-batches and ranks cannot change its gradient (that of the experts' balance loss it can,
    see `objectives`). The gradient is clipped once, by its norm over all ranks, after unscaling.
    The weights are touched only when loss and gradient are finite, on all ranks or none.

    Args:
        model: on ``device`` already.
        objective: loss of the stage.
        config: optimizer, schedule, clipping and precision.
        device: where to compute.
        engine: how the model lies on the ranks; default: one process has all.

    Raises:
        ConfigError: unknown optimizer, schedule or option; the model keeps its activations.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainingConfig,
        *,
        device: torch.device,
        engine: Engine | None = None,
    ) -> None:
        self.model, self.objective, self.config, self.device = model, objective, config, device
        _set_activation_checkpointing(model, config.activation_checkpointing)
        self.engine = engine or OneProcess(device, config.precision)
        self.wrapped = self.engine.wrap(model)
        self.optimizers = self.engine.optimizers(build_optimizers(model, config))
        self.schedule = Schedule(config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._parameters = self.optimizers.parameters()
        self.busy_s = 0.0  # of this rank in loading and forward passes, of all steps together

    def __call__(
        self, micro_batches: Iterable[Any], *, step: int, first_loss: FirstLoss | None = None
    ) -> StepStats:
        """Do the update that follows ``step`` finished ones.

        Args:
            micro_batches: all of the step, on the CPU.
            step: finished optimizer steps.
            first_loss: what the loss must be before this update.

        Raises:
            DivergedError: loss or gradient is not finite, or the first loss is refused.
            DataError: the step has no unit.
        """
        begin = time.perf_counter()
        micro_batches = list(micro_batches)  # a loader makes them when they are asked for
        self.busy_s += time.perf_counter() - begin
        counts = [
            sum(self.objective.units(batch) for batch in micro_batches),
            sum(batch.n_tokens for batch in micro_batches),
            sum(self.objective.scored(batch) for batch in micro_batches),
        ]
        units, tokens, scored = map(int, group().sum(counts))
        if units == 0:
            raise DataError(f"step {step + 1} has no {self.objective.unit} to learn from")
        own = self._backward(micro_batches, units)
        named = group().sum_tensors({"loss": own.loss_sum, **own.metrics})
        loss_sum = named.pop("loss")
        for part in self.optimizers.parts:
            self.scaler.unscale_(part)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        loss, grad_norm = float(loss_sum) / units, float(whole(norm))  # the one wait of a step
        self._check_finite(
            loss, grad_norm, step=step, micro_batches=micro_batches, own_sum=own.loss_sum
        )
        if first_loss is not None:
            first_loss.check(loss)
        every = self.config.grad_log_every
        due = every > 0 and (step + 1) % every == 0
        gradients = gradient_statistics(self.model.named_parameters()) if due else {}
        if grad_norm > self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self.config.max_grad_norm, norm)
        factor = self.schedule.factor(step)
        self.optimizers.set_factor(factor)
        if math.isfinite(grad_norm):  # else fp16 overflowed: no part may step, the scale falls
            self.optimizers.step(self.scaler)
        self.scaler.update()
        self.optimizers.zero_grad()
        means = {name: value / units for name, value in named.items()} | gradients
        lr = self.config.lr * factor
        return StepStats(loss, grad_norm, lr, units, tokens, scored, means)

    def _backward(self, micro_batches: Sequence[Any], units: int) -> Terms:
        """Accumulate the gradient of the mean; returns this rank's sums, without their graph."""
        loss_sum = torch.zeros((), device=self.device)
        metrics: dict[str, Tensor] = {}
        share = units / group().world_size  # every engine averages gradients over the ranks
        last = len(micro_batches) - 1
        for i, batch in enumerate(micro_batches):
            with self.engine.accumulating(self.wrapped) if i < last else nullcontext():
                begin = time.perf_counter()
                with autocast(self.device, self.config.precision):
                    terms = self.objective(self.wrapped, batch.to(self.device))
                self.busy_s += time.perf_counter() - begin
                total = terms.loss_sum if terms.aux_sum is None else terms.loss_sum + terms.aux_sum
                torch.autograd.backward(self.scaler.scale(total / share))
            loss_sum += terms.loss_sum.detach()
            for name, value in terms.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return Terms(loss_sum, metrics)

    def _check_finite(
        self,
        loss: float,
        grad_norm: float,
        *,
        step: int,
        micro_batches: Sequence[Any],
        own_sum: Tensor,
    ) -> None:
        """Raise before the update, on all ranks; an overflow that the fp16 scaler answers is none.

        Args:
            loss: of all ranks.
            grad_norm: of all ranks.
            step: finished optimizer steps.
            micro_batches: of this rank.
            own_sum: loss of this rank.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        scaler_answers = self.scaler.is_enabled() and self.scaler.get_scale() > MIN_FP16_SCALE
        if scaler_answers and math.isfinite(loss):
            return
        rows = [i for b in micro_batches if hasattr(b, "index_B") for i in b.index_B.tolist()]
        facts = group().gather([float(own_sum), *rows])  # as many rows on every rank
        broken = [r for r, (own, *_) in enumerate(facts) if not math.isfinite(own)]
        chosen = broken or range(len(facts))
        rows = [int(row) for r in chosen for row in facts[r][1:]]
        told = f", rank {', '.join(map(str, broken))}" if broken and len(facts) > 1 else ""
        named = f" (data rows {rows})" if rows else ""
        raise DivergedError(
            f"step {step + 1}{told}{named}: loss={loss:.4g}, grad_norm={grad_norm:.4g}; {WAY_OUT}"
        )

    def state_dict(self, *, copy: bool = False) -> dict[str, Any]:
        """Moments of the optimizer and the fp16 scale; all ranks call it, rank 0 gets all.

        Args:
            copy: apart from what trains on, on the CPU.
        """
        moments = self.engine.optimizer_state(self.optimizers, copy=copy)
        return {"optimizer": moments, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned on rank 0.

        Raises:
            CheckpointError: it is of another optimizer.
        """
        self.engine.load_optimizer_state(self.optimizers, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _set_activation_checkpointing(model: nn.Module, wanted: bool) -> None:
    """Apply the option to the model, or say that it cannot be."""
    switch = getattr(model, "set_activation_checkpointing", None)
    if switch is not None:
        switch(wanted)
    elif wanted:
        raise ConfigError(f"training.activation_checkpointing: {type(model).__name__} has none")

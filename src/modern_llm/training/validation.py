"""What is done with a model beside its training, such as a pass over held-out batches."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from modern_llm.errors import DataError
from modern_llm.runtime.devices import autocast
from modern_llm.runtime.ranks import group
from modern_llm.runtime.seeding import rng_state, set_rng_state
from modern_llm.runtime.signals import StopSignal, leave_together
from modern_llm.training.objectives import Objective

Hook = Callable[[nn.Module], Mapping[str, Any]]


def aside(
    call: Hook, model: nn.Module, stop: StopSignal, *, device: torch.device, compiled: bool
) -> Mapping[str, Any] | None:
    """Call with the model in eval mode, unless a stop comes; mode and random state stay.

    Args:
        call: gets the model.
        model: as it trains.
        stop: of the loop.
        device: whose random state is kept.
        compiled: whether the model is; it compiles nothing more for this.
    """
    training, state = model.training, rng_state(device)
    stance = torch.compiler.set_stance("eager_on_recompile") if compiled else None
    model.eval()
    try:
        with torch.no_grad(), stance or nullcontext():
            return stop.unless(lambda: call(model))
    finally:
        model.train(training)
        set_rng_state(state, device)


def mean_loss(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    *,
    device: torch.device,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Loss and metrics of ``objective`` over all units of ``batches``, each unit weighted equally.

    Args:
        model: put into eval mode for the pass and back after it.
        objective: gives sums and units.
        batches: the whole split, in a fixed order; each of several ranks computes a part of it.
        device: where the model is.
        precision: of the forward pass; sums are float64.

    Returns:
        ``loss`` in nats a unit, ``units`` (a count), and the objective's metrics as means.

    Raises:
        DataError: no batch has a unit.
    """
    training, units = model.training, 0
    ranks = group().ranks
    sums: dict[str, torch.Tensor] = {}
    model.eval()
    try:
        with torch.no_grad():
            # Every rank computes as often: parts of a shared model meet in each forward pass.
            for start in range(0, len(batches), ranks.world_size):
                leave_together()
                own = start + ranks.rank
                batch = batches[min(own, len(batches) - 1)]
                with autocast(device, precision):
                    terms = objective(model, batch.to(device))
                counted = int(own < len(batches))  # else another rank has this one
                units += counted * objective.units(batch)
                for name, value in {"loss": terms.loss_sum, **terms.metrics}.items():
                    value = counted * value.detach().to(torch.float64)
                    sums[name] = sums[name] + value if name in sums else value
    finally:
        model.train(training)
    units = int(group().sum([units])[0])
    if units == 0:
        raise DataError(f"the validation split has no {objective.unit} to score")
    sums = group().sum_tensors(sums)
    # A metric may be a vector, such as the load of each expert.
    return {**{name: (value / units).tolist() for name, value in sums.items()}, "units": units}

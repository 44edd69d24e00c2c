"""One fixed pass over held-out batches with a stage's own objective."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from modern_llm.errors import DataError
from modern_llm.runtime.devices import autocast
from modern_llm.training.objectives import Objective


def mean_loss(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Any],
    *,
    device: torch.device,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Loss and metrics of ``objective`` over all units of ``batches``, each unit weighted equally.

    Args:
        model: put into eval mode for the pass and back after it.
        objective: gives sums and units.
        batches: the whole split, in a fixed order.
        device: where the model is.
        precision: of the forward pass; sums are float64.

    Returns:
        ``loss`` in nats a unit, ``units`` (a count), and the objective's metrics as means.

    Raises:
        DataError: no batch has a unit.
    """
    training, units = model.training, 0
    sums: dict[str, torch.Tensor] = {}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                units += objective.units(batch)
                with autocast(device, precision):
                    terms = objective(model, batch.to(device))
                for name, value in {"loss": terms.loss_sum, **terms.metrics}.items():
                    value = value.detach().to(torch.float64)
                    sums[name] = sums[name] + value if name in sums else value
    finally:
        model.train(training)
    if units == 0:
        raise DataError(f"the validation split has no {objective.unit} to score")
    # A metric may be a vector, such as the load of each expert.
    return {**{name: (value / units).tolist() for name, value in sums.items()}, "units": units}

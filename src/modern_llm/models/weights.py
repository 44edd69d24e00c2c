"""A model's weights as a flat dict, each tensor once, by names that compiling does not change."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modern_llm.errors import CheckpointError

COMPILED_PREFIX = "_orig_mod."


class WeightsMixin(nn.Module):
    """`weights` and `load_weights` for models whose tied tensors are one parameter."""

    def weights(self) -> dict[str, Tensor]:
        """Name -> tensor (not a copy, without gradient), sorted by name."""
        state = {k.replace(COMPILED_PREFIX, ""): v.detach() for k, v in self.state_dict().items()}
        return dict(sorted(state.items()))

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy ``weights`` in place, cast to the model's dtype; all or nothing.

        Raises:
            CheckpointError: names or shapes differ; says which, and loads nothing.
        """
        own = self.weights()
        given = {name.replace(COMPILED_PREFIX, ""): x for name, x in weights.items()}
        problems = [f"{name}: missing from the checkpoint" for name in own.keys() - given.keys()]
        problems += [f"{name}: not in this model" for name in given.keys() - own.keys()]
        problems += [
            f"{name}: {_shape(given[name])} in the checkpoint, {_shape(x)} in this model"
            for name, x in own.items()
            if name in given and given[name].shape != x.shape
        ]
        if problems:
            problems.sort()
            more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
            listing = "\n  ".join(problems[:8])
            raise CheckpointError(f"weights of another architecture:\n  {listing}{more}")
        for name, x in own.items():
            x.copy_(given[name])


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "scalar"

"""A model's weights as a flat dict, each tensor once, by names that compiling does not change."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from modern_llm.errors import CheckpointError

COMPILED_PREFIX = "_orig_mod."


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor (not a copy, without gradient), each storage once."""
    weights: dict[str, Tensor] = {}
    seen: set[tuple[int, int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = own.untyped_storage()._cdata  # an address would be 0 on the meta device
        key = (storage, tensor.storage_offset(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        weights[name.replace(COMPILED_PREFIX, "")] = tensor
    return weights


@torch.no_grad()
def copy_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str, problems: Sequence[str] = ()
) -> None:
    """Copy ``weights`` into ``model`` in place, all or nothing; tied tensors stay tied.

    Args:
        model: of the same dtypes.
        weights: tensors by name; see `model_weights`.
        source: where they come from, as the user is told.
        problems: what is known to differ beside the tensors.

    Raises:
        CheckpointError: names, shapes or dtypes differ; says which, and loads nothing.
    """
    own = model_weights(model)
    given = {name.replace(COMPILED_PREFIX, ""): x for name, x in weights.items()}
    found = [*problems]
    found += [f"'{name}' is missing" for name in own if name not in given]
    found += [f"'{name}' has no place" for name in given if name not in own]
    found += [
        f"'{name}' is {_kind(given[name])}, the model has {_kind(x)}"
        for name, x in own.items()
        if name in given and _kind(given[name]) != _kind(x)
    ]
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(found[:8])}{more}")
    for name, x in own.items():
        x.copy_(placed(given[name], x))


def whole(x: Tensor) -> Tensor:
    """A tensor of which each rank has a part, put together on all of them; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def placed(x: Tensor, like: Tensor) -> Tensor:
    """The part of ``x`` that this rank has of ``like``; all of it where ``like`` is whole.

    Args:
        x: the same on every rank.
        like: of the same shape.
    """
    if not isinstance(like, DTensor):
        return x
    mesh = like.device_mesh
    return distribute_tensor(x.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


class WeightsMixin(nn.Module):
    """`model_weights` and `copy_weights` as methods."""

    def weights(self) -> dict[str, Tensor]:
        """See `model_weights`."""
        return model_weights(self)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """See `copy_weights`."""
        copy_weights(self, weights, source="this set of weights")

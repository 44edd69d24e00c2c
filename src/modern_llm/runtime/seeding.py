"""Random state: seeding, saving it in a form that loads without pickle, deriving seeds."""

import hashlib
import random
from typing import Any

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine and Python version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators (all devices)."""
    random.seed(seed)
    torch.manual_seed(seed)


def seed_rank(seed: int, rank: int, *place: int) -> None:
    """Seed the generators of training: another sequence on every rank, so that dropout differs.

    Args:
        seed: of the stage.
        rank: the first one has what one process alone has.
        place: more that tells the others' sequences apart, such as the step.
    """
    seed_everything(derive_seed(seed, "training", *((rank, *place) if rank else ())))


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of Python, torch and ``device``, loads with ``weights_only=True``.

    Of the device in use alone: a restart may be on a machine with another number of them.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = {"cuda": torch.cuda.get_rng_state(device)}
    elif device.type == "mps":
        state["device"] = {"mps": torch.mps.get_rng_state()}
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned; a device of another type keeps its own state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    saved = state.get("device", {}).get(device.type)
    if saved is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved, device)
    elif saved is not None:
        torch.mps.set_rng_state(saved)

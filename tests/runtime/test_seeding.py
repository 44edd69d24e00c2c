import hashlib
import io
import random
from typing import Any

import pytest
import torch

from modern_llm.runtime.seeding import derive_seed, rng_state, seed_everything, set_rng_state

CPU = torch.device("cpu")


def draws() -> tuple[float, float, list[float]]:
    return random.random(), random.gauss(0, 1), torch.rand(3).tolist()


@pytest.mark.parametrize(
    ("parts", "text"),
    [((), ""), ((0,), "0"), (("a", 1), "a\x1f1"), (("epoch", 3, 7), "epoch\x1f3\x1f7")],
)
def test_derived_seeds_are_those_of_the_definition(parts: tuple[object, ...], text: str) -> None:
    expected = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2
    assert derive_seed(*parts) == expected < 2**63


def test_derived_seeds_never_change() -> None:
    """Recorded once: a change here changes every run, every generated row and every order."""
    assert derive_seed("synthetic", 0, "text", "train", 0) == 835326889489194196
    assert derive_seed(0) == 3456079177858693020


def test_parts_do_not_run_together() -> None:
    assert len({derive_seed("ab", "c"), derive_seed("a", "bc"), derive_seed("abc")}) == 3


def test_seeding_repeats() -> None:
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert draws() != first


def test_state_goes_through_a_file_without_pickled_code() -> None:
    seed_everything(11)
    draws()
    random.gauss(0, 1)  # leaves half of a pair behind, which is part of the state
    file = io.BytesIO()
    torch.save(rng_state(CPU), file)
    expected = [draws() for _ in range(3)]

    seed_everything(0)
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True), CPU)

    assert [draws() for _ in range(3)] == expected


class Generators:
    """A kind of device with so many generators; a call without a device is for the first."""

    def __init__(self, count: int) -> None:
        self.states = [torch.tensor([i + 1], dtype=torch.uint8) for i in range(count)]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.states[getattr(device, "index", None) or 0].clone()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.states[getattr(device, "index", None) or 0] = state

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return self.states

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        for i, state in enumerate(states):
            self.states[i] = state


@pytest.mark.parametrize(
    ("name", "there"), [("cuda:1", "cuda:0"), ("cuda", "cuda"), ("mps", "mps")]
)
def test_the_state_of_the_training_device_goes_to_a_machine_with_fewer(
    monkeypatch: pytest.MonkeyPatch, name: str, there: str
) -> None:
    kind = name.partition(":")[0]
    many, one = Generators(4), Generators(1)

    def here(generators: Generators) -> None:
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: True, raising=False)
        for call in ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"):
            target = getattr(torch, kind)
            monkeypatch.setattr(target, call, getattr(generators, call), raising=False)

    here(many)
    state = rng_state(torch.device(name))
    here(one)
    one.states[0] = torch.tensor([99], dtype=torch.uint8)
    set_rng_state(state, torch.device(there))
    assert one.states[0].item() == (2 if name == "cuda:1" else 1)
    set_rng_state(state, CPU)  # nor does another kind of device mind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_again() -> None:
    device = torch.device("cuda")
    state = rng_state(device)
    first = torch.rand(3, device=device).tolist()
    set_rng_state(state, device)
    assert torch.rand(3, device=device).tolist() == first

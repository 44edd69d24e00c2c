"""One training, whatever the engine and the number of ranks: losses, weights, validation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher, rows
from safetensors.torch import load_file

STEPS = 20
FEW = ["training.max_steps=6"]
PARENT = {"pretrain": None, "sft": "pretrain", "dpo": "sft", "verifier": "dpo"}
SIZES = {
    # Odd, so that no number of ranks divides the embeddings.
    "model.vocab_size": 301,
    "model.n_layers": 2,
    "training.max_steps": STEPS,
    "training.batch_size": 12,
    "training.micro_batch_size": 2,
    "pretrain.training": {"max_steps": STEPS},
}
# Name of a run, its stage, and what differs from the config.
RUNS: dict[str, tuple[str, list[str]]] = {
    "pretrain": ("pretrain", []),
    "sft": ("sft", []),
    "dpo": ("dpo", []),
    "verifier": ("verifier", []),
    "untied": ("pretrain", ["model.tie_embeddings=false", *FEW]),
    "learned": ("pretrain", ["model.position=learned", *FEW]),
    "muon": ("pretrain", ["training.optimizer=muon", *FEW]),
    "checkpointed": ("pretrain", ["training.activation_checkpointing=true", *FEW]),
    # The balance loss of experts is a product of two means over a micro-batch: it is the same on
    # all ranks only where the micro-batches are, so each has one row here.
    "experts": (
        "pretrain",
        [
            'model.moe={"n_experts": 3, "top_k": 2, "balance_coef": 0.01}',
            "training.micro_batch_size=1",
            *FEW,
        ],
    ),
    "compiled": ("pretrain", ["training.compile=true", *FEW]),
}
STAGES = ("pretrain", "sft", "dpo", "verifier")
HARD = ("untied", "learned", "muon", "experts")
GRAD_OP, HYBRID = (f'{{"name": "fsdp", "sharding": "{kind}"}}' for kind in ("grad_op", "hybrid"))
JOBS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "2 ddp": (2, "ddp", (*STAGES, *HARD, "checkpointed")),
    "2 zero1": (2, "zero1", ("sft", "muon")),
    "2 fsdp": (2, "fsdp", (*STAGES, *HARD, "checkpointed")),
    "3 fsdp": (3, "fsdp", ("sft", "verifier", *HARD)),
    "2 grad_op": (2, GRAD_OP, ("sft", "checkpointed")),
    "4 hybrid": (4, HYBRID, ("sft", "muon")),
}


def no_changes(rank: int) -> dict[str, str]:
    return {}


def two_machines(rank: int) -> dict[str, str]:
    return {"LOCAL_RANK": str(rank % 2)}


def cases(parents: Path, folder: Path, names: Sequence[str], *changes: str) -> list[dict[str, Any]]:
    found = []
    for name in names:
        stage, overrides = RUNS[name]
        before = PARENT[stage] if name in STAGES else None
        parent = before and str(parents / before / "final")
        all_changes = [*overrides, *changes]
        case = {"stage": stage, "run": str(folder / name), "parent": parent}
        found.append({**case, "overrides": all_changes})
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    return write_tiny(tmp_path_factory.mktemp("same"), SIZES)


@pytest.fixture(scope="module")
def parents(config: Path, rank_server: Any) -> Path:
    """A run of one process, from whose stages all others start."""
    job = Launcher(rank_server).command(0, "--config", config, "--no-report", "--run-name=parents")
    job.succeeds()
    return config.parent / "runs" / "parents"


@pytest.fixture(scope="module")
def one(config: Path, parents: Path, rank_server: Any) -> Path:
    """What one process comes to."""
    folder = config.parent / "one"
    names = [name for name in RUNS if name != "compiled"]
    Launcher(rank_server)(0, "train", config=str(config), cases=cases(parents, folder, names))
    return folder


def distance(one: Path, other: Path) -> float:
    """Largest of any tensor, relative to its norm."""
    mine, theirs = (load_file(path / "final" / "model.safetensors") for path in (one, other))
    assert mine.keys() == theirs.keys()
    return max(
        float((theirs[name] - tensor).double().norm() / tensor.double().norm().clamp(min=1e-9))
        for name, tensor in mine.items()
    )


def assert_same_training(one: Path, other: Path, *, rounded: bool) -> None:
    """Of a stage: losses, gradients, counts, validation, and the weights that it came to.

    Args:
        rounded: Muon's iterations are in bf16, which rounds a gradient that differs in its last
            bit: equal to 1e-5 are then the losses alone.
    """
    mine, theirs = rows(one), rows(other)
    for row, of_other in zip(mine, theirs, strict=True):
        assert row.keys() == of_other.keys()
        assert (row.pop("kind"), row["step"]) == (of_other["kind"], of_other["step"])
        for key, value in row.items():
            rel = 1e-3 if rounded and key != "loss" else 1e-5
            assert of_other[key] == pytest.approx(value, rel=rel, abs=1e-6), (key, row["step"])
    assert distance(one, other) < (5e-3 if rounded else 1e-5)


@pytest.mark.parametrize("name", JOBS)
def test_every_engine_trains_what_one_process_trains(
    ranks: Launcher, config: Path, parents: Path, one: Path, name: str
) -> None:
    world_size, engine, names = JOBS[name]
    folder = config.parent / name.replace(" ", "-")
    changes = [f"training.distributed={engine}"]
    if world_size == 4:
        changes.append("training.micro_batch_size=1")  # the batch is 12
    environ = two_machines if world_size == 4 else no_changes
    given = cases(parents, folder, names, *changes)
    ranks(world_size, "train", config=str(config), cases=given, environ=environ)
    for run in names:
        stage, _ = RUNS[run]
        mine, theirs = one / run / stage, folder / run / stage
        assert_same_training(mine, theirs, rounded=run == "muon")


@pytest.mark.slow
def test_a_compiled_model_is_sharded(
    ranks: Launcher, config: Path, parents: Path, one: Path
) -> None:
    """Equal to one process that compiles nothing; its activations are computed twice there."""
    for engine in ("ddp", "fsdp"):
        folder = config.parent / f"compiled-{engine}"
        given = cases(parents, folder, ["compiled"], f"training.distributed={engine}")
        ranks(2, "train", config=str(config), cases=given)
        mine, theirs = (one / "checkpointed", folder / "compiled")
        assert_same_training(mine / "pretrain", theirs / "pretrain", rounded=False)

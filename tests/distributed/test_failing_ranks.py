"""A rank that dies, raises, hangs or computes nonsense ends the job, and one message says why."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Job, Launcher, rows
from safetensors.torch import load_file

from modern_llm.training.checkpoint import verify_checkpoint
from modern_llm.training.retention import list_checkpoints

TIMEOUT_S = 4
SIZES = {
    "model.vocab_size": 301,
    "training.batch_size": 12,
    "training.micro_batch_size": 2,
    "training.save_every": 2,
    "training.keep_last": 9,
    "pretrain.training": {"max_steps": 9},
    "pretrain.data": [{"name": "synthetic", "kind": "text", "rows": 40, "held_out_rows": 8}],
    "rank_timeout_s": TIMEOUT_S,
}
STEP = "training.trainer:Trainer.train_step"
Start = Callable[..., tuple[Job, Path]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    return write_tiny(tmp_path_factory.mktemp("failing"), SIZES)


@pytest.fixture
def start(ranks: Launcher, config: Path, request: pytest.FixtureRequest) -> Start:
    """Start pretraining with faults; returns the job and the folder of the stage."""

    def begin(world_size: int, engine: str, *faults: dict[str, Any]) -> tuple[Job, Path]:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name)
        job = ranks.command(
            world_size, "--config", config, "--stage=pretrain", "--no-report",
            f"training.distributed={engine}", f"--run-name={name}", faults=list(faults),
        )  # fmt: skip
        return job, config.parent / "runs" / name / "pretrain"

    return begin


def saved(stage: Path) -> list[int]:
    """Steps of the checkpoints, every byte of which verifies."""
    folders = list_checkpoints(stage / "checkpoints")
    for folder in folders:
        verify_checkpoint(folder)
        for tensor in load_file(folder / "model.safetensors").values():
            assert torch.isfinite(tensor).all()
    return [int(folder.name.removeprefix("step-")) for folder in folders]


@pytest.mark.parametrize(
    ("world_size", "engine", "rank", "do"),
    [(2, "ddp", 1, "SIGKILL"), (3, "fsdp", 1, "SIGKILL"), (2, "fsdp", 0, "SIGKILL"),
     (2, "zero1", 1, "fail"), (2, "fsdp", 0, "fail")],
)  # fmt: skip
def test_a_rank_that_dies_or_raises_ends_the_others(
    start: Start, world_size: int, engine: str, rank: int, do: str
) -> None:
    job, stage = start(world_size, engine, {"at": STEP, "nth": 4, "rank": rank, "do": do})
    job.wait(TIMEOUT_S + 20)
    codes = [7] * world_size
    codes[rank] = -signal.SIGKILL if do == "SIGKILL" else 1
    assert job.codes == codes, job.text
    # Of two that are left, the second may find rank 0 gone, and not know that it told.
    assert 1 <= len(job.errors()) <= world_size - 1, job.text
    told = job.errors()[0]
    other = next(i for i in range(world_size) if told.startswith(f"error: rank {i} of"))
    assert other != rank
    assert f"rank {other} of {world_size} on " in told
    assert "pretrain, step 4: another rank died or did not answer" in told
    assert job.text.count("ValueError: a bug of this rank") == (do == "fail")
    assert saved(stage) == [2]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_rank_that_hangs_is_waited_for_as_long_as_is_told(start: Start, engine: str) -> None:
    job, stage = start(2, engine, {"at": STEP, "nth": 4, "rank": 1, "do": "hang"})
    begin = time.perf_counter()
    job.wait_for(job.ranks[0].ended, TIMEOUT_S + 20)
    assert time.perf_counter() - begin >= TIMEOUT_S
    job.kill()
    assert job.ranks[0].code == 7
    assert len(job.errors()) == 1
    assert f"pretrain, step 4: another rank died or did not answer within {TIMEOUT_S} s" in job.text
    assert saved(stage) == [2]


def test_a_rank_that_dies_while_rank_0_prepares_data(start: Start) -> None:
    """Rank 0 finds out when it wants to go on; nothing hangs."""
    dies = {"at": "alignment.pipeline:_log_of_rank", "rank": 1, "do": "SIGKILL"}
    prepares = {"at": "alignment.stages.pretrain:training_stores", "rank": 0, "do": "pause"}
    job, stage = start(2, "ddp", dies, prepares)
    job.wait(TIMEOUT_S + 20)
    assert job.codes == [7, -signal.SIGKILL], job.text
    assert len(job.errors()) == 1, job.text
    assert saved(stage) == []


def test_rank_0_is_waited_for_as_long_as_it_prepares(start: Start) -> None:
    """Beyond the timeout of a step; and what is written while the others wait counts too."""
    job, stage = start(
        2, "ddp",
        {"at": "alignment.stages.pretrain:training_stores", "rank": 0, "do": "take long"},
        {"at": "training.saving:write_checkpoint", "nth": 4, "rank": 0, "do": "take long"},
    )  # fmt: skip
    job.succeeds()
    assert time.perf_counter() - job.begin > 2 * TIMEOUT_S
    assert saved(stage) == [2, 4, 6, 8, 9]


def test_a_rank_that_dies_before_all_have_met(start: Start) -> None:
    for point in ("runtime.ranks:rendezvous", "runtime.ranks:Group.__init__"):
        job, stage = start(2, "ddp", {"at": point, "rank": 1, "do": "SIGKILL"})
        job.wait(2 * TIMEOUT_S + 20)
        assert job.codes == [7, -signal.SIGKILL], f"{point}: {job.text}"
        assert len(job.errors()) == 1, job.text
        assert not stage.exists()


def test_what_fails_on_rank_0_alone_is_told_once_with_its_code(start: Start) -> None:
    job, _ = start(
        3, "ddp", {"at": "alignment.stages.pretrain:training_stores", "rank": 0, "do": "data"}
    )
    job.wait(TIMEOUT_S + 20)
    assert job.codes == [3, 3, 3], job.text
    assert job.errors() == ["error: the data is not what it was"]


def test_an_unreachable_server_is_no_dead_rank(start: Start) -> None:
    """What a library raises of a connection of its own is not taken for one of a rank."""
    job, _ = start(
        2, "ddp",
        {"at": "alignment.stages.pretrain:training_stores", "rank": 0, "do": "no connection"},
    )  # fmt: skip
    job.wait(TIMEOUT_S + 20)
    assert job.codes == [1, 1], job.text
    assert "ConnectionRefusedError: Connection refused" in job.text
    assert "another rank" not in job.text


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine", ["ddp", "zero1", "fsdp"])
def test_a_weight_that_is_not_finite_on_one_rank_ends_all(
    start: Start, engine: str, rank: int
) -> None:
    job, stage = start(2, engine, {"at": STEP, "nth": 4, "rank": rank, "do": "break weight"})
    job.wait(TIMEOUT_S + 20)
    assert job.codes == [5, 5], job.text
    assert len(job.errors()) == 1, job.text
    told = job.errors()[0]
    assert "step 4, rank " in told
    if engine != "fsdp":  # where the others gather the broken part, they compute nonsense too
        assert f"step 4, rank {rank}:" in told
    assert "loss=nan" in told
    assert told.endswith(f"last good checkpoint: {stage / 'checkpoints/step-00000002'}")
    assert saved(stage) == [2]
    assert not (stage / "final").exists()
    assert [row["step"] for row in rows(stage, "train")] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in rows(stage, "train"))
    assert [row["status"] for row in rows(stage, "stop")] == ["diverged"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_names_it(start: Start, engine: str) -> None:
    fault = {"at": "training.objectives:LMObjective.__call__", "rank": 1, "do": "break loss"}
    job, stage = start(2, engine, {**fault, "nth": 14})  # two a validation pass, three a step
    job.wait(TIMEOUT_S + 20)
    assert job.codes == [5, 5], job.text
    assert len(job.errors()) == 1, job.text
    assert ", rank 1: loss=nan" in job.errors()[0]
    assert saved(stage) == [2]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_weights_that_are_not_finite_are_never_published(start: Start, engine: str) -> None:
    """Broken after the last loss that could show it, just before they are saved."""
    job, stage = start(
        2, engine, {"at": STEP, "nth": 4, "rank": 0, "do": "break weight", "after": True}
    )
    job.wait(TIMEOUT_S + 20)
    assert job.codes == [5, 5], job.text
    assert len(job.errors()) == 1, job.text
    assert "step-00000004 is not saved: weight" in job.errors()[0]
    assert saved(stage) == [2]

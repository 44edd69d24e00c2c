"""Rank 0 leads: it alone writes results, and the others find what they read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import Launcher, rows

from modern_llm.reporting.record import check_run

STAGES = ("pretrain", "sft", "dpo", "verifier")
SIZES = {
    "model.vocab_size": 301,
    "training.max_steps": 4,
    "training.batch_size": 6,
    "training.micro_batch_size": 1,
    "training.sample_every": 2,
    "training.grad_log_every": 2,
    "pretrain.training": {"max_steps": 4},
}
# Wherever ranks meet, and where each reads what rank 0 has made.
PAUSES = [
    {"at": at, "do": "pause", "nth": 0}
    for at in (
        "runtime.ranks:Group.share",
        "alignment.stages.base:TrainedStage.evaluate",
        "training.trainer:read_checkpoint",
        "training.saving:write_checkpoint",
        "data.prepare:build_store",
    )
]


@pytest.mark.parametrize(("world_size", "engine"), [(2, "fsdp"), (3, "ddp"), (1, "fsdp")])
def test_all_stages_with_ranks_that_come_late(
    ranks: Launcher, write_tiny: Callable[..., Path], tmp_path: Path, world_size: int, engine: str
) -> None:
    """Nobody reads what is not whole, nobody but rank 0 writes, and the record is one run's."""
    config, watch = write_tiny(tmp_path, SIZES), tmp_path / "changed-"
    job = ranks.command(
        world_size, "--config", config, f"training.distributed={engine}",
        faults=PAUSES, watch=str(watch),
    ).succeeds()  # fmt: skip
    run = tmp_path / "runs" / "tiny"
    for stage in STAGES:
        result = json.loads((run / stage / "result.json").read_text())
        assert result["status"] == "finished"
        assert [row["step"] for row in rows(run / stage, "train")] == [1, 2, 3, 4]
        assert [row["step"] for row in rows(run / stage, "sample")] == [2, 4]
        start = rows(run / stage, "start")[0]
        assert (start["world_size"], start["engine"]) == (world_size, engine)
    assert (run / "eval" / "result.json").exists()
    assert check_run(run) == []
    assert len(list((tmp_path / "report").glob("*.md"))) == 1
    for rank in range(1, world_size):
        mine = [name for name in (Path(f"{watch}{rank}").read_text().splitlines())]
        below = {name for name in mine if name.startswith(str(tmp_path))}
        assert below <= {str(run / "logs"), str(run / "logs" / f"rank-{rank:05d}.log")}, below
        assert job.ranks[rank].text == ""  # one console
    logs = sorted(path.name for path in (run / "logs").iterdir())
    assert logs == [f"rank-{rank:05d}.log" for rank in range(world_size)]
    assert all("pretrain" in (run / "logs" / name).read_text() for name in logs[:1])


def test_the_same_command_after_the_end_computes_nothing(
    ranks: Launcher, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """On another number of ranks too: what is finished stands."""
    config = write_tiny(tmp_path, {**SIZES, "training.sample_every": 0})
    arguments = ["--config", config, "--stage=pretrain", "--no-report"]
    ranks.command(2, *arguments, "training.distributed=ddp").succeeds()
    stage = tmp_path / "runs" / "tiny" / "pretrain"
    before = {path: path.stat().st_mtime_ns for path in stage.rglob("*")}
    ranks.command(3, *arguments, "training.distributed=fsdp").succeeds()
    ranks.command(0, *arguments).succeeds()
    assert {path: path.stat().st_mtime_ns for path in stage.rglob("*")} == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]

"""Checkpoints that are written beside training: whole or not at all, whoever dies when."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher, rows

from modern_llm.runtime.artifacts import sha256_file
from modern_llm.training.checkpoint import read_checkpoint, verify_checkpoint
from modern_llm.training.retention import list_checkpoints, newest_good, step_of

STEPS = 9
SIZES = {
    "model.vocab_size": 301,
    "model.dropout": 0.2,
    "training.batch_size": 8,
    "training.micro_batch_size": 2,
    "training.eval_every": 3,
    "training.save_every": 2,
    "training.keep_last": 2,
    "pretrain.training": {"max_steps": STEPS},
    "pretrain.data": [{"name": "synthetic", "kind": "text", "rows": 40, "held_out_rows": 8}],
    "rank_timeout_s": 20,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    return write_tiny(tmp_path_factory.mktemp("saving"), SIZES)


def arguments(config: Path, engine: str, name: str) -> list[str]:
    return [
        "--config", str(config), "--stage=pretrain", "--no-report", f"--run-name={name}",
        f"training.distributed={engine}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(engine: str, config: Path, rank_server: Any) -> Path:
    Launcher(rank_server).command(2, *arguments(config, engine, f"whole-{engine}")).succeeds()
    return config.parent / "runs" / f"whole-{engine}" / "pretrain"


def assert_same(one: Path, other: Path) -> None:
    files = [at / "final" / "model.safetensors" for at in (one, other)]
    assert sha256_file(files[0]) == sha256_file(files[1])
    assert rows(one) == rows(other)
    assert not list((other / "checkpoints").glob(".tmp-*"))


def newest(stage: Path) -> int:
    good = newest_good(stage / "checkpoints")
    return -1 if good is None else step_of(good)


POINTS = (
    {"at": "training.saving:write_checkpoint"},
    {"at": "training.checkpoint:save_file", "after": True},  # between two files
    {"at": "training.checkpoint:sha256_file", "nth": 3},
    {"at": "runtime.artifacts:os.rename"},
    {"at": "runtime.artifacts:os.rename", "after": True},
    {"at": "training.saving:prune", "nth": 2},
    {"at": "training.retention:shutil.rmtree", "nth": 1},
    {"at": "training.progress:RunLog.saved"},
)


def test_killed_inside_a_save_the_last_good_one_stands(
    ranks: Launcher, engine: str, config: Path, whole: Path
) -> None:
    """Rank 0, which writes, dies at one point of a save after the other; rank 1 ends with it."""
    name, before = f"inside-{engine}", -1
    stage = config.parent / "runs" / name / "pretrain"
    for point in POINTS:
        fault = {"do": "SIGKILL", "rank": 0, **point}
        job = ranks.command(2, *arguments(config, engine, name), faults=[fault]).wait()
        if job.codes == [0, 0]:
            break
        assert job.codes == [-signal.SIGKILL, 7], f"{point}: {job.text}"
        assert newest(stage) >= before, point
        before = newest(stage)
        for folder in list_checkpoints(stage / "checkpoints"):
            verify_checkpoint(folder)
    ranks.command(2, *arguments(config, engine, name)).succeeds()
    assert_same(whole, stage)


def test_killed_at_random_moments_it_comes_to_the_same_bits(
    ranks: Launcher, engine: str, config: Path, whole: Path
) -> None:
    """One rank or all of them; the others end by themselves."""
    draw, name, before, kills = random.Random(3), f"random-{engine}", -1, 0
    stage = config.parent / "runs" / name / "pretrain"
    log, options = stage / "metrics.jsonl", ["rank_timeout_s=6"]
    while kills < 8:
        job = ranks.command(2, *arguments(config, engine, name), *options)
        length = log.stat().st_size if log.exists() else 0
        if kills:  # the first comes at any moment, also before the ranks have met
            job.wait_for(lambda length=length: log.exists() and log.stat().st_size > length)
        time.sleep(draw.uniform(0.0, 0.15))
        for rank in draw.choice(([0], [1], [0, 1])):
            job.ranks[rank].kill()
        job.wait()
        if job.codes == [0, 0]:
            break
        assert set(job.codes) <= {-signal.SIGKILL, 7}, job.text
        kills += 1
        assert newest(stage) >= before
        before = newest(stage)
    ranks.command(2, *arguments(config, engine, name)).succeeds()
    assert kills >= 3
    assert_same(whole, stage)


def test_training_goes_on_while_a_checkpoint_is_written(
    ranks: Launcher, engine: str, config: Path
) -> None:
    """Up to the next one, which waits for it; at every moment one can be loaded."""
    name = f"slow-{engine}"
    stage = config.parent / "runs" / name / "pretrain"
    block = {"at": "training.saving:write_checkpoint", "rank": 0, "do": "block", "nth": 2}
    job = ranks.command(2, *arguments(config, engine, name), faults=[block])

    def step() -> int:
        return max((row["step"] for row in rows(stage, "train")), default=0)

    job.wait_for((stage / "blocked").exists)
    job.wait_for(lambda: step() == 6)  # step 4 is being written, step 6 is to be saved
    assert newest(stage) == 2
    time.sleep(0.2)
    assert step() == 6
    assert not any(rank.ended() for rank in job.ranks)
    (stage / "release").touch()
    while not all([rank.ended() for rank in job.ranks]):
        assert newest(stage) >= 2
    job.succeeds()
    assert [row["step"] for row in rows(stage, "save")] == [2, 4, 6, 8, 9]
    assert [row["step"] for row in rows(stage, "train")] == [*range(1, STEPS + 1)]


def test_what_is_written_is_of_the_step_that_it_is_named_for(
    ranks: Launcher, engine: str, config: Path, whole: Path
) -> None:
    """Steps that go on beside the writer change nothing of what it writes."""
    name = f"apart-{engine}"
    stage = config.parent / "runs" / name / "pretrain"
    block = {"at": "training.saving:write_checkpoint", "rank": 0, "do": "block", "nth": 4}
    job = ranks.command(2, *arguments(config, engine, name), faults=[block])
    job.wait_for((stage / "blocked").exists)  # step 8
    job.wait_for(lambda: rows(stage, "train")[-1]["step"] == STEPS)
    (stage / "release").touch()
    job.succeeds()
    written = [read_checkpoint(at / "checkpoints/step-00000008") for at in (whole, stage)]
    assert written[0].weights.keys() == written[1].weights.keys()
    for file in ("model.safetensors", "trainer.pt"):
        hashes = {sha256_file(at / "checkpoints/step-00000008" / file) for at in (whole, stage)}
        assert len(hashes) == 1 or file == "trainer.pt"
    assert_same(whole, stage)


def test_a_full_disk_ends_all_ranks_with_one_message(
    ranks: Launcher, engine: str, config: Path, whole: Path, make_disk: Callable[..., Path]
) -> None:
    disk = make_disk(kb=8000)
    fill = {"at": "training.saving:write_checkpoint", "rank": 0, "do": "fill disk", "nth": 3}
    job = ranks.command(
        2, *arguments(config, engine, "full"), f"--output-dir={disk}", faults=[fill]
    ).wait(40)
    assert job.codes == [6, 6], job.text
    assert len(job.errors()) == 1, job.text
    stage = disk / "full" / "pretrain"
    assert f"cannot write checkpoint {stage / 'checkpoints'}" in job.errors()[0]
    assert "bytes" in job.errors()[0]
    assert newest(stage) == 4
    assert not list((stage / "checkpoints").glob(".tmp-*"))
    assert "Traceback" not in job.text


def test_a_job_of_one_rank(ranks: Launcher, config: Path, engine: str) -> None:
    """As one process without a launcher, whatever the engine."""
    for name, world_size, distributed in (("alone", 0, "none"), (f"one-{engine}", 1, engine)):
        ranks.command(world_size, *arguments(config, distributed, name)).succeeds()
    one, other = (config.parent / "runs" / name / "pretrain" for name in ("alone", f"one-{engine}"))
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)


def test_the_copy_of_an_only_part_is_apart(ranks: Launcher, config: Path) -> None:
    """Of one rank the whole tensor is that rank's part itself, which trains on."""
    ranks.command(1, *arguments(config, "fsdp", "only")).succeeds()
    stage = config.parent / "runs" / "only-blocked" / "pretrain"
    block = {"at": "training.saving:write_checkpoint", "rank": 0, "do": "block", "nth": 4}
    job = ranks.command(1, *arguments(config, "fsdp", "only-blocked"), faults=[block])
    job.wait_for((stage / "blocked").exists)  # step 8
    job.wait_for(lambda: rows(stage, "train")[-1]["step"] == STEPS)
    (stage / "release").touch()
    job.succeeds()
    whole = config.parent / "runs" / "only" / "pretrain"
    file = "checkpoints/step-00000008/model.safetensors"
    assert sha256_file(whole / file) == sha256_file(stage / file)

"""What cannot be is refused at once: one message from one rank, the right code, nothing written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from launching import Job, Launcher

LIMIT_S = 20.0  # and not the timeout of the ranks, which is 600
SIZES = {
    "training.batch_size": 12,
    "training.micro_batch_size": 2,
    "pretrain.training": {"max_steps": 2},
    "pretrain.data": [{"name": "synthetic", "kind": "text", "rows": 40, "held_out_rows": 8}],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    return write_tiny(tmp_path_factory.mktemp("launch"), SIZES)


@pytest.fixture(scope="module")
def other_model(config: Path, rank_server: Any) -> Path:
    """A checkpoint of another model than the config's."""
    arguments = ["--config", config, "--stage=pretrain", "--no-report"]
    job = Launcher(rank_server).command(
        0, *arguments, "--run-name=other", "model.d_model=16", f"--output-dir={config.parent}/wide"
    )
    job.succeeds()
    return config.parent / "wide" / "other"


def assert_refused(job: Job, config: Path, *told: str, code: int = 2) -> None:
    """All ranks end with ``code``, one of them says why."""
    job.wait(LIMIT_S)
    assert set(job.codes) == {code}, job.text
    assert len(job.errors()) == 1, job.text
    for text in told:
        assert text in job.errors()[0]
    assert "Traceback" not in job.text
    assert not (config.parent / "runs").exists()


CASES: dict[str, tuple[int, list[str], dict[str, str], tuple[str, ...]]] = {
    "processes without an engine": (
        2, [], {}, ("2 processes were started", "training.distributed=none is one process"),
    ),
    "an engine without a launcher": (
        0, ["training.distributed=ddp"], {}, ("training.distributed=ddp needs a launcher",),
    ),
    "one GPU for all": (
        2, ["training.distributed=ddp", "training.device=cuda:1"], {},
        ("training.device=cuda:1 is one GPU for 2 processes",),
    ),
    "no port": (
        2, ["training.distributed=ddp"], {"MASTER_PORT": ""}, ("MASTER_PORT is not set",),
    ),
    "no rank": (2, ["training.distributed=ddp"], {"RANK": ""}, ("RANK is not set",)),
    "a rank beyond the last": (
        2, ["training.distributed=ddp"], {"WORLD_SIZE": "two"}, ("must be whole numbers",),
    ),
    "a batch that does not divide": (
        2, ["training.distributed=ddp", "training.micro_batch_size=4"], {},
        ("batch_size=12 is not a multiple of micro_batch_size x ranks = 4 x 2",),
    ),
    "an engine that is not there": (
        2, ["training.distributed=fdsp"], {}, ("unknown engine 'fdsp'", "fsdp"),
    ),
    "an option that is not there": (
        2, ['training.distributed={"name": "fsdp", "shards": 2}'], {},
        ("engine 'fsdp'", "shards", "sharding"),
    ),
    "fp16 in shards": (
        2, ["training.distributed=fsdp", "training.precision=fp16"], {}, ("fp16",),
    ),
    "machines of different sizes": (
        3, ['training.distributed={"name": "fsdp", "sharding": "hybrid"}',
            "training.micro_batch_size=1"], {"LOCAL_RANK": "0 1 0"},
        ("as many ranks on every machine", "[0, 1, 0]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if "machines" not in name])
def test_a_launch_that_cannot_be_is_refused(ranks: Launcher, config: Path, name: str) -> None:
    world_size, overrides, changes, told = CASES[name]

    def environ(rank: int) -> Mapping[str, str]:
        return changes

    job = ranks.command(world_size, "--config", config, *overrides, environ=environ)
    assert_refused(job, config, *told)


def test_machines_with_different_numbers_of_ranks_cannot_be_hybrid(
    ranks: Launcher, config: Path
) -> None:
    world_size, overrides, changes, told = CASES["machines of different sizes"]
    job = ranks.command(
        world_size, "--config", config, "--stage=pretrain", *overrides,
        f"--output-dir={config.parent}/hybrid",
        environ=lambda rank: {"LOCAL_RANK": changes["LOCAL_RANK"].split()[rank]},
    )  # fmt: skip
    assert_refused(job, config, *told)
    assert not list((config.parent / "hybrid").glob("*/*/metrics.jsonl"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_of_another_model_is_refused(
    ranks: Launcher, config: Path, other_model: Path, engine: str
) -> None:
    final = other_model / "pretrain" / "final"
    job = ranks.command(
        2, "--config", config, "--stage=sft", "--checkpoint", final,
        f"training.distributed={engine}",
    )  # fmt: skip
    assert_refused(job, config, "model.d_model is 16 there and 32 here", code=4)


def test_two_jobs_in_one_folder(ranks: Launcher, config: Path) -> None:
    """The second is refused while the first works; the first is not disturbed."""
    folder = config.parent / "both"
    arguments = [
        "--config", config, "--stage=pretrain", "--no-report", f"--output-dir={folder}",
        "training.distributed=ddp",
    ]  # fmt: skip
    block = {"at": "training.saving:write_checkpoint", "rank": 0, "do": "block"}
    first = ranks.command(2, *arguments, faults=[block])
    stage = folder / "tiny" / "pretrain"
    first.wait_for((stage / "blocked").exists)
    second = ranks.command(2, *arguments).wait(LIMIT_S)
    assert second.codes == [2, 2], second.text
    assert len(second.errors()) == 1, second.text
    assert f"is in use by another run (pid {first.ranks[0].pid} on" in second.errors()[0]
    (stage / "release").touch()
    first.succeeds()
    assert json.loads((stage / "result.json").read_text())["status"] == "finished"
    assert [path.name for path in folder.iterdir()] == ["tiny"]


def test_one_rank_without_the_others_says_who_is_missing(ranks: Launcher, config: Path) -> None:
    """Each of those that came, when rank 0 is not there to say it."""
    arguments = ["--config", config, "training.distributed=ddp", "rank_timeout_s=2"]
    for missing in (0, 1):
        job = ranks.command(
            1, *arguments, environ=lambda rank: {"RANK": str(1 - missing), "WORLD_SIZE": "2"}  # noqa: B023
        ).wait(LIMIT_S)  # fmt: skip
        assert job.codes == [7], job.text
        assert f"rank {1 - missing} of 2 on" in job.text
        assert "did not meet the others at 127.0.0.1:" in job.text
        assert len(job.errors()) == 1

"""A signal to one rank: all save the same step and end with 75, and the same command goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher, rows

from modern_llm.runtime.artifacts import sha256_file
from modern_llm.training.retention import list_checkpoints

STEPS = 6
SIZES = {
    "model.vocab_size": 301,
    "model.dropout": 0.2,
    "training.batch_size": 8,
    "training.micro_batch_size": 2,
    "training.eval_every": 2,
    "training.save_every": 4,
    "pretrain.training": {"max_steps": STEPS},
    "pretrain.data": [{"name": "synthetic", "kind": "text", "rows": 40, "held_out_rows": 8}],
    "rank_timeout_s": 20,
}
TRAINER = "training.trainer:Trainer"
# In the order of what they interrupt: who has the signal, where, and the step that is saved then.
STOPS: list[tuple[str, int, dict[str, Any], int | None]] = [
    ("rank 0 prepares data", 0, {"at": "alignment.stages.pretrain:training_stores"}, None),
    ("before the first order", 1, {"at": "alignment.pipeline:_log_of_rank"}, 0),
    ("before a validation pass", 1, {"at": "runtime.signals:StopSignal.unless"}, 0),
    ("in a validation pass", 1, {"at": "training.validation:leave_together", "nth": 2}, 0),
    ("in a validation pass", 0, {"at": "training.validation:leave_together", "nth": 2}, 0),
    ("in a step", 1, {"at": f"{TRAINER}.train_step", "nth": 2}, 2),
    ("in a step", 0, {"at": f"{TRAINER}.train_step", "nth": 1}, 3),
    ("while a checkpoint is written", 1, {"at": f"{TRAINER}._save", "after": True}, 5),
    ("after the last validation batch", 1, {"at": "alignment.stages.base:mean_loss",
                                            "nth": 1, "after": True}, None),
    ("while it is published", 0, {"at": f"{TRAINER}._publish"}, None),
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    return write_tiny(tmp_path_factory.mktemp("signals"), SIZES)


def run(engine: str, config: Path, name: str) -> list[str]:
    return [
        "--config", str(config), "--stage=pretrain", f"training.distributed={engine}",
        f"--run-name={name}", "--no-report",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(engine: str, config: Path, rank_server: Any) -> Path:
    """A run of two ranks that nothing disturbed."""
    Launcher(rank_server).command(2, *run(engine, config, f"whole-{engine}")).succeeds()
    return config.parent / "runs" / f"whole-{engine}"


def assert_same(one: Path, other: Path) -> None:
    files = [at / "pretrain/final/model.safetensors" for at in (one, other)]
    assert sha256_file(files[0]) == sha256_file(files[1])
    assert rows(one / "pretrain") == rows(other / "pretrain")


def test_a_signal_to_one_rank_stops_all_of_them(
    ranks: Launcher, engine: str, config: Path, whole: Path, tmp_path: Path
) -> None:
    """One run that is stopped at one place after the other comes to the same bits."""
    name, status = f"stopped-{engine}", tmp_path / "status.json"
    folder = config.parent / "runs" / name
    for what, rank, fault, step in STOPS:
        status.unlink(missing_ok=True)
        job = ranks.command(
            2, *run(engine, config, name),
            faults=[{**fault, "do": "SIGUSR1", "rank": rank}],
            environ=lambda rank: {"MODERN_LLM_STATUS_FILE": str(status)},
        ).wait(60)  # fmt: skip
        assert job.codes == [75, 75], f"{what}, rank {rank}: {job.text}"
        assert len(job.errors()) == 1, f"{what}, rank {rank}: {job.text}"
        assert "SIGUSR1" in job.errors()[0]
        told = json.loads(status.read_text())
        assert told["exit_code"] == 75
        assert told["reason"] == job.errors()[0].removeprefix("error: ")
        saved = [int(path.name[5:]) for path in list_checkpoints(folder / "pretrain/checkpoints")]
        if step is not None:
            assert saved[-1] == step, f"{what}, rank {rank}: {saved}"
            assert f"after step {step}" in told["reason"], what
    ranks.command(2, *run(engine, config, name)).succeeds()
    assert_same(folder, whole)
    assert (folder / "pretrain/result.json").exists()

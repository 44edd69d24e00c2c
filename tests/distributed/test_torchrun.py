"""Under torchrun: signals and restarts, with the status file for the exit code that it loses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher, rows

from modern_llm.runtime.artifacts import sha256_file
from modern_llm.training.retention import list_checkpoints

pytestmark = pytest.mark.slow
SIZES = {
    "model.vocab_size": 301,
    "model.dropout": 0.2,
    "training.batch_size": 8,
    "training.micro_batch_size": 2,
    "training.save_every": 10,
    "pretrain.training": {"max_steps": 40},
    "pretrain.data": [{"name": "synthetic", "kind": "text", "rows": 40, "held_out_rows": 8}],
}
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    return write_tiny(tmp_path_factory.mktemp("torchrun"), SIZES)


def arguments(config: Path, name: str) -> list[str]:
    return [
        "--config", str(config), "--stage=pretrain", "--no-report", f"--run-name={name}",
        "training.distributed=fsdp",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(config: Path, rank_server: Any) -> Path:
    Launcher(rank_server).command(2, *arguments(config, "whole")).succeeds()
    return config.parent / "runs" / "whole" / "pretrain"


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Start]:
    """Start two ranks of a module or a file; what is left of them is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*program: str, flags: Sequence[str] = ()) -> "subprocess.Popen[str]":
        own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        own |= {"MODERN_LLM_STATUS_FILE": str(tmp_path / "status.json")}
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             f"--signals-to-handle={SIGNALS}", *flags, *program],
            env=own, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def assert_same(one: Path, other: Path) -> None:
    files = [at / "final" / "model.safetensors" for at in (one, other)]
    assert sha256_file(files[0]) == sha256_file(files[1])
    assert rows(one) == rows(other)


def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(
    torchrun: Start, config: Path, whole: Path, tmp_path: Path
) -> None:
    told = ["-m", "modern_llm", "run", *arguments(config, "stopped")]
    stage = config.parent / "runs" / "stopped" / "pretrain"
    first = torchrun(*told)
    until = time.perf_counter() + 80
    while not list_checkpoints(stage / "checkpoints"):
        assert time.perf_counter() < until
        assert first.poll() is None, first.stderr and first.stderr.read()
        time.sleep(0.005)
    first.send_signal(signal.SIGUSR1)
    _, errors = first.communicate(timeout=60)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["exit_code"] == 75, errors
    assert "SIGUSR1 after step" in status["reason"]
    assert errors.count("error: pretrain: SIGUSR1 after step") == 1
    second = torchrun(*told)
    _, errors = second.communicate(timeout=90)
    assert second.returncode == 0, errors
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 0
    assert_same(whole, stage)


def test_torchrun_starts_all_again_when_a_rank_dies(
    torchrun: Start, config: Path, whole: Path, tmp_path: Path
) -> None:
    fault = {"at": "training.trainer:Trainer.train_step", "nth": 15, "rank": 1, "do": "SIGKILL"}
    given = {
        "arguments": ["run", *arguments(config, "again")],
        "faults": [{**fault, "once": str(tmp_path / "died")}],
    }
    job = Path(__file__).with_name("jobs.py")
    process = torchrun(str(job), json.dumps(given), flags=["--max-restarts=1"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "died").exists()
    assert json.loads((tmp_path / "status.json").read_text()) == {"exit_code": 0, "reason": "done"}
    stage = config.parent / "runs" / "again" / "pretrain"
    assert [row["step"] for row in rows(stage, "start")] == [0, 10]
    assert_same(whole, stage)

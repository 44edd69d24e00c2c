"""Runs of the whole pipeline that are killed, stopped, or started twice at once (R1-R3, R15)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.reporting.record import check_run
from modern_llm.runtime.artifacts import sha256_file
from modern_llm.training.checkpoint import read_checkpoint, verify_checkpoint
from modern_llm.training.retention import list_checkpoints, newest_good

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TRAINED = ("pretrain", "sft", "dpo", "verifier")
STEPS = 6
CLOCK = {
    *("tokens_per_s", "tflops", "mfu", "step_s", "time_s"),
    *("memory_gb", "memory_peak_gb"),
}  # what clock and machine decide
CHANGES = {
    # Dropout is on: equal bits need an equal random state after every restart.
    "model.dropout": 0.2,
    "training.max_steps": STEPS,
    "training.save_every": 1,
    "training.eval_every": 2,
    "training.micro_batch_size": 2,
    "training.keep_last": 2,
    "pretrain.training": {"max_steps": STEPS},
    "pretrain.data": [{"name": "synthetic", "kind": "text", "rows": 40, "held_out_rows": 8}],
    "sft.data": [{"name": "synthetic", "kind": "problems", "rows": 12, "held_out_rows": 8}],
    "data.replay": 0.25,
}
Config = Callable[..., Path]


class Server:
    """Starts command lines in processes of their own; see `pipeline_server`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("pipeline_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments: object) -> tuple[int, Path]:
        """Process id, and the file of what it says."""
        self.count += 1
        log = self.folder / f"log-{self.count}.txt"
        log.touch()
        return self.ask({"arguments": list(map(str, arguments)), "log": str(log)}), log

    def wait(self, pid: int) -> int:
        return self.ask({"wait": pid})

    def run(self, *arguments: object) -> tuple[int, str]:
        pid, log = self.start(*arguments)
        return self.wait(pid), log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("logs"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=20)


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory, write_tiny: Config) -> Path:
    """A run that nothing disturbed, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_tiny(folder, CHANGES)
    begin = time.perf_counter()
    code, log = server.run("run", "--config", config)
    assert code == 0, log
    (folder / "seconds").write_text(str(time.perf_counter() - begin))
    return folder / "runs" / "tiny"


def seconds(whole: Path) -> float:
    return float((whole.parents[1] / "seconds").read_text())


def rows(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    """Every stage came to the same bits: weights, state, metrics, scores, samples."""
    for stage in TRAINED:
        mine, theirs = run / stage, whole / stage
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            files = [folder / "final" / name for folder in (mine, theirs)]
            assert sha256_file(files[0]) == sha256_file(files[1]), f"{stage}: {name}"
        steps = [
            [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(at, stage)
             if row["kind"] in ("train", "eval")]
            for at in (run, whole)
        ]  # fmt: skip
        assert steps[0] == steps[1], stage
        assert [row["step"] for row in steps[0] if row["kind"] == "train"] == [*range(1, STEPS + 1)]
        states = [
            read_checkpoint(folder / "checkpoints" / f"step-{STEPS:08d}").trainer_state()
            for folder in (mine, theirs)
        ]
        assert_equal(states[0]["update"], states[1]["update"])
        assert_equal(states[0]["rng"], states[1]["rng"])
        record = json.loads((mine / "run.json").read_text())  # whole, and nothing twice
        assert [row["step"] for row in record["iterations"]] == [*range(1, STEPS + 1)]
        results = [json.loads((folder / "result.json").read_text()) for folder in (mine, theirs)]
        for key in ("scores", "audit", "data", "model", "not_evaluated"):
            assert results[0][key] == results[1][key], f"{stage}: {key}"
        for key in ("steps", "tokens", "final_loss", "best"):
            assert results[0]["training"][key] == results[1]["training"][key], f"{stage}: {key}"
        assert not list((mine / "checkpoints").glob(".tmp-*"))
    evals = [json.loads((at / "eval" / "result.json").read_text()) for at in (run, whole)]
    assert evals[0]["reasoning"] == evals[1]["reasoning"]
    for one, other in zip(evals[0]["models"], evals[1]["models"], strict=True):
        assert one["scores"] == other["scores"]
        assert one["samples"] == other["samples"]
    assert check_run(run) == []


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def reached(run: Path) -> tuple[int, int]:
    """Stages that are finished, and the step of the newest good checkpoint of the next one."""
    done = sum((run / stage / "result.json").exists() for stage in TRAINED)
    if done == len(TRAINED):
        return done, 0
    newest = newest_good(run / TRAINED[done] / "checkpoints")
    return done, 0 if newest is None else int(newest.name.removeprefix("step-"))


def test_killed_at_random_moments_it_comes_to_the_same_bits(
    server: Server, whole: Path, write_tiny: Config, tmp_path: Path
) -> None:
    """Kill -9 up to 18 times, whatever runs, and the same command again.

    The first comes when a checkpoint is there, so that at least one start goes on from one.
    """
    draw, folder = random.Random(7), tmp_path / "killed"
    config, kills, stages, before = write_tiny(folder, CHANGES), 0, set(), (0, 0)
    run = folder / "runs" / "tiny"
    longest = 0.35 * seconds(whole)
    while True:
        pid, log = server.start("run", "--config", config)
        if kills < 18:
            while kills == 0 and not reached(run)[1]:
                time.sleep(0.001)
            time.sleep(draw.uniform(0.02, longest) if kills else 0)
            os.kill(pid, signal.SIGKILL)
        code = server.wait(pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
        kills += 1
        now = reached(run)
        assert now >= before, "a finished stage or a saved step was lost"
        before = now
        stages.add(now[0])
        for final in run.glob("*/final"):
            verify_checkpoint(final)
    assert kills >= 8
    assert len(stages) >= 2  # killed in several stages
    assert_same(run, whole)
    restarts = sum(
        json.loads((run / stage / "result.json").read_text())["provenance"]["restarts"]
        for stage in TRAINED
    )
    assert 0 < restarts <= kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stopped_again_and_again_it_comes_to_the_same_bits(
    server: Server, whole: Path, write_tiny: Config, tmp_path: Path, number: signal.Signals
) -> None:
    """Whatever it is doing, the exit code is 75, and the next start goes on."""
    draw, folder = random.Random(int(number)), tmp_path / "stopped"
    config, stops = write_tiny(folder, CHANGES), 0
    run = folder / "runs" / "tiny"
    while True:
        pid, log = server.start("run", "--config", config)
        if stops < 6:
            until = time.perf_counter() + 20
            while not log.stat().st_size and time.perf_counter() < until:
                time.sleep(0.002)  # it is at work: its handlers are in place
            time.sleep(draw.uniform(0.0, 0.15 * seconds(whole)))  # far from the end, at any load
            os.kill(pid, number)
        code, told = server.wait(pid), log.read_text()
        if code == 0:
            break
        assert code == 75, f"{code}: {told}"
        assert "Traceback" not in told
        assert told.splitlines()[-1].startswith(f"error: {number.name}") or (
            f": {number.name} after step" in told
        )
        stops += 1
    assert stops >= 2
    assert_same(run, whole)
    statuses = {row["status"] for stage in TRAINED for row in rows(run, stage)
                if row["kind"] == "stop"}  # fmt: skip
    assert statuses <= {f"signal:{number.name}", "finished"}


def test_two_at_once_do_not_disturb_each_other(
    server: Server, whole: Path, write_tiny: Config, tmp_path: Path
) -> None:
    """One folder has one process; the other is refused, or has a folder of its own."""
    folder = tmp_path / "both"
    config = write_tiny(folder, CHANGES)
    started = [server.start("run", "--config", config) for _ in range(2)]
    codes = [server.wait(pid) for pid, _ in started]
    told = [log.read_text() for _, log in started]
    assert sorted(codes) in ([0, 0], [0, 2]), told
    for code, text in zip(codes, told, strict=True):
        assert "Traceback" not in text
        if code == 2:
            assert "is in use by another run (pid " in text
            assert f"pid {started[1 - codes.index(2)][0]} on" in text
    runs = sorted((folder / "runs").iterdir())
    assert len(runs) == codes.count(0)
    for run in runs:
        assert_same(run, whole)


def test_a_second_start_while_it_runs_is_refused(
    server: Server, write_tiny: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "busy"
    config = write_tiny(folder, {**CHANGES, "pretrain.training": {"max_steps": 5000}})
    run = folder / "runs" / "tiny"
    pid, _ = server.start("run", "--config", config, "--stage", "pretrain")
    try:
        until = time.perf_counter() + 30
        while not list_checkpoints(run / "pretrain" / "checkpoints"):
            assert time.perf_counter() < until
            time.sleep(0.01)
        for flags in ((), ("--no-overwrite",), ("--resume",), ("--force",)):
            code, told = server.run("run", "--config", config, "--stage", "pretrain", *flags)
            assert code == 2, told
            assert f"is in use by another run (pid {pid} on" in told
        code, told = server.run(
            "run", "--config", config, "--stage", "pretrain", "--force", "seed=9"
        )
        assert code == 2, told  # nor is it moved away from under the one that writes there
        assert sorted(path.name for path in run.parent.iterdir()) == ["tiny"]
    finally:
        os.kill(pid, signal.SIGKILL)
        server.wait(pid)
    code, told = server.run("run", "--config", config, "--stage", "pretrain", "--dry-run")
    assert code == 0, told  # the lock died with its process

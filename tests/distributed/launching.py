"""Jobs of several ranks on this machine: started together, ended after a time limit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 90.0  # of a job; none that is healthy needs a third of it
Environ = Callable[[int], Mapping[str, str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """See `rank_server`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        unset = ("MODERN_LLM_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        environ = {key: value for key, value in os.environ.items() if key not in unset}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, job: str, options: Mapping[str, Any], environ: Mapping[str, str]) -> "Process":
        self.count += 1
        log = self.folder / f"log-{self.count}.txt"
        log.touch()
        asked = {"job": job, "options": options, "environ": environ, "log": str(log)}
        return Process(self, self.ask(asked), log)


@dataclass
class Process:
    """One rank; ``code`` is known when it has ended."""

    server: Server
    pid: int
    log: Path
    code: int | None = None

    @property
    def text(self) -> str:
        return self.log.read_text()

    def ended(self) -> bool:
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended():
            os.kill(self.pid, number)


@dataclass
class Job:
    """All ranks of one start."""

    ranks: list[Process]
    begin: float = field(default_factory=time.perf_counter)

    def wait(self, limit_s: float = LIMIT_S) -> "Job":
        """Until all ranks have ended; those that are late are killed, and it is a failure."""
        while not all([rank.ended() for rank in self.ranks]):
            if time.perf_counter() - self.begin > limit_s:
                late = [i for i, rank in enumerate(self.ranks) if rank.code is None]
                self.kill()
                pytest.fail(f"ranks {late} hang after {limit_s:g} s:\n{self.text}")
            time.sleep(0.01)
        return self

    def wait_for(self, what: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Until ``what`` is true, while the job runs."""
        while not what():
            assert not all([rank.ended() for rank in self.ranks]), f"it ended:\n{self.text}"
            assert time.perf_counter() - self.begin < limit_s, self.text
            time.sleep(0.005)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            while not rank.ended():
                time.sleep(0.01)

    @property
    def codes(self) -> list[int | None]:
        return [rank.code for rank in self.ranks]

    @property
    def text(self) -> str:
        return "\n".join(f"rank {i}: {rank.text}" for i, rank in enumerate(self.ranks))

    def errors(self) -> list[str]:
        """What all ranks tell as errors, one a line."""
        lines = (line for rank in self.ranks for line in rank.text.splitlines())
        return [line for line in lines if line.startswith("error: ")]

    def succeeds(self) -> "Job":
        self.wait()
        assert self.codes == [0] * len(self.ranks), self.text
        return self


class Launcher:
    """Starts jobs; ``launcher(2, "train", folder=...)`` waits for one and wants it to succeed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.jobs: list[Job] = []

    def start(
        self, world_size: int, job: str, *, environ: Environ = lambda rank: {}, **options: Any
    ) -> Job:
        """Start ``job`` on so many ranks (0: one process without a launcher)."""
        port = str(free_port())
        processes = []
        for rank in range(max(1, world_size)):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            given = {k: v for k, v in ({**own, **environ(rank)} if world_size else {}).items() if v}
            processes.append(self.server.start(job, options, given))
        self.jobs.append(Job(processes))
        return self.jobs[-1]

    def __call__(self, world_size: int, job: str, **options: Any) -> Job:
        return self.start(world_size, job, **options).succeeds()

    def command(self, world_size: int, *arguments: object, **options: Any) -> Job:
        """Start ``modern-llm run``."""
        told = ["run", *map(str, arguments)]
        return self.start(world_size, "command", arguments=told, **options)


def rows(stage: Path, *kinds: str) -> list[dict[str, Any]]:
    """Rows of a stage's log, without what clock and machine decide."""
    clock = ("tokens_per_s", "tflops", "mfu", "step_s", "time_s", "memory_gb", "memory_peak_gb")
    of_ranks = ("busy_s_of_ranks", "memory_peak_gb_of_ranks", "slowest_rank")
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] in (kinds or ("train", "eval"))]
    return [{k: v for k, v in row.items() if k not in (*clock, *of_ranks)} for row in found]

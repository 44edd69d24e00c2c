"""Cells of a sweep: one training each, in a process of its own, several at once.

A cell is the pretrain stage of one config on one text. Its folder is named after the hash of both,
so what is finished is found again, what was stopped goes on, and another config or text never meets
its files.
"""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

import torch

from modern_llm.config import PipelineConfig
from modern_llm.errors import ConfigError, StoppedBySignal
from modern_llm.runtime.artifacts import sha256_json, write_json
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.signals import StopSignal

log = get_logger(__name__)
POLL_S = 0.05
TOLD_LINES = 12  # of a cell that failed
READ_S = 5.0  # at most, for its last lines: a process that it left may keep the pipe open


@dataclass(frozen=True, eq=False)
class Cell:
    """One training of a sweep.

    Attributes:
        label: as the console names it.
        config: of the run; ``config.paths.output`` is the folder of all cells.
        plugins: files that register components of the config.
        text: hash of what it is trained and scored on.
    """

    label: str
    config: PipelineConfig
    plugins: tuple[Path, ...] = ()
    text: str = ""

    @cached_property
    def name(self) -> str:
        """Name of the run: the label, and the hash of all that can change a number."""
        return f"{self.label}-{sha256_json([self.config.sha256(), self.text])[:10]}"

    @property
    def folder(self) -> Path:
        """Folder of the cell's pretrain stage."""
        return self.config.paths.output / self.name / "pretrain"

    @property
    def finished(self) -> bool:
        """Whether its result stands."""
        return (self.folder / "result.json").is_file()

    def command(self) -> list[str]:
        """The command that trains it, or goes on."""
        config = self.config.model_copy(update={"name": self.name}).model_dump(mode="json")
        # Named after all of it: another place or logging is another file, of the same cell.
        name = f"{self.name}-{sha256_json(config)[:6]}.json"
        file = self.config.paths.output / "configs" / name
        write_json(file, config, on_exists="skip")
        plugins = [word for path in self.plugins for word in ("--plugin", str(path))]
        chosen = ["run", "--stage", "pretrain", "--config", str(file), "--no-report", *plugins]
        return [sys.executable, "-m", "modern_llm", *chosen]


@dataclass
class _Running:
    """A cell's process and the last lines that it wrote."""

    cell: Cell
    slot: int
    process: "subprocess.Popen[str]"
    began: float
    reader: threading.Thread = field(init=False)
    asked: bool = False  # to save and end
    lines: "deque[str]" = field(default_factory=lambda: deque(maxlen=TOLD_LINES))

    def __post_init__(self) -> None:
        assert self.process.stderr is not None
        stream = self.process.stderr
        self.reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self.reader.start()

    def _read(self, stream: IO[str]) -> None:
        """Keep the last lines of its standard error, so that it never waits for a reader."""
        with stream:
            self.lines.extend(line.rstrip() for line in stream)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slots(jobs: int | None, threads: int) -> list[dict[str, str]]:
    """What is set in the environment of each cell that runs at the same time.

    Args:
        jobs: how many; default: one a GPU, without a GPU as many as there are cores for.
        threads: of each cell.

    Raises:
        ConfigError: ``jobs`` is below 1.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs={jobs}: at least 1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = jobs or gpus or max(1, cores() // threads)
    shared = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if not gpus:
        return [shared] * count
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(i) for i in range(gpus)]
    return [{**shared, "CUDA_VISIBLE_DEVICES": names[i % len(names)]} for i in range(count)]


def run_cells(
    cells: Sequence[Cell], *, environments: Sequence[Mapping[str, str]], until: float | None = None
) -> dict[str, str]:
    """Train every cell that is not finished; one that fails does not stop the others.

    Args:
        cells: in the order in which they are started.
        environments: see `slots`; as many cells run at once.
        until: ``time.monotonic()`` past which none is started.

    Returns:
        Name of each cell that has no result -> why, in the order of ``cells``.

    Raises:
        StoppedBySignal: a signal came; running cells have saved, and the same call goes on.
    """
    cells = list({cell.name: cell for cell in cells}.values())
    todo = [cell for cell in cells if not cell.finished]
    if len(todo) < len(cells):
        log.info("%d of %d trainings are finished already", len(cells) - len(todo), len(cells))
    failed: dict[str, str] = {}
    waiting, running, free = deque(todo), list[_Running](), deque(range(len(environments)))
    done = 0
    with StopSignal() as stop:
        try:
            while (waiting and not stop.requested) or running:
                if until is not None and time.monotonic() > until:
                    failed |= {cell.name: "not started: the budget is used up" for cell in waiting}
                    waiting.clear()
                while waiting and free and not stop.requested:
                    slot = free.popleft()
                    running.append(_start(waiting.popleft(), slot, environments[slot]))
                time.sleep(POLL_S)
                if stop.requested:
                    _pass_on(running)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.slot)
                    done += 1
                    if told := _conclude(one, done, len(todo)):
                        failed[one.cell.name] = told
        finally:
            _pass_on(running)
            for one in running:
                one.process.wait()
        if stop.requested:
            raise StoppedBySignal(
                f"{stop.requested}: {len([c for c in cells if c.finished])} of {len(cells)} "
                "trainings are finished, those under way have saved; the same command goes on "
                "from there (without --force)"
            )
    return {cell.name: failed[cell.name] for cell in cells if cell.name in failed}


def _start(cell: Cell, slot: int, environment: Mapping[str, str]) -> _Running:
    # The status that a launcher reads is this process's, not a cell's.
    own = {k: v for k, v in os.environ.items() if k != "MODERN_LLM_STATUS_FILE"}
    process = subprocess.Popen(
        cell.command(), env={**own, **environment}, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then asks once
    )  # fmt: skip
    return _Running(cell, slot, process, time.monotonic())


def _pass_on(running: Sequence[_Running]) -> None:
    """Ask each running cell to save and end, once."""
    for one in running:
        if not one.asked and one.process.poll() is None:
            one.asked = True
            one.process.terminate()


def _conclude(one: _Running, done: int, total: int) -> str:
    """Tell how a cell ended; returns why it has no result, or nothing."""
    seconds = time.monotonic() - one.began
    if one.cell.finished:
        log.info("%d/%d %s: finished in %.0f s", done, total, one.cell.label, seconds)
        return ""
    one.reader.join(READ_S)
    code = one.process.returncode
    lines = list(one.lines)
    first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), -1)
    told = f"exit code {code}: {' '.join(lines[first:]).strip() or 'no message'}"
    log.warning("%d/%d %s: %s", done, total, one.cell.label, told)
    return told

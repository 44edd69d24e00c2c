"""Cells: what runs at once, what is told of a failure, and how a sweep stops and goes on.

The processes here are small scripts in the place of trainings; `test_study` trains.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import as_overrides, load_config
from modern_llm.errors import ConfigError, StoppedBySignal
from modern_llm.experiments import cells as cells_module
from modern_llm.experiments.cells import Cell, _Running, run_cells, slots

FINISH = """
(folder / "result.json").write_text(json.dumps([dict(os.environ), began, time.time()]))
"""
SAVE_AND_END = """
def save(number, frame):
    with (folder / "saved").open("a") as file:
        file.write(f"{os.getpid()} ")
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "ready").write_text(str(os.getpid()))
if (folder / "saved").exists():
    (folder / "result.json").write_text("{}")
else:
    time.sleep(60)
"""
PRELUDE = """
import json, os, pathlib, signal, sys, time
began, folder = time.time(), pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
"""
Make = Callable[..., Cell]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A cell whose process runs a script: ``make("a", FINISH)``; without, the real command."""
    scripts: dict[str, str] = {}
    command = Cell.command

    def fake(cell: Cell) -> list[str]:
        if cell.label not in scripts:
            return command(cell)
        return [sys.executable, "-S", "-c", PRELUDE + scripts[cell.label], str(cell.folder)]

    monkeypatch.setattr(Cell, "command", fake)

    def make(label: str, script: str | None = None, text: str = "", **changes: Any) -> Cell:
        if script is not None:
            scripts[label] = script
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        given = {"paths.output": str(tmp_path / "cells"), **dotted}
        return Cell(label, load_config("gpt2", as_overrides(given)), text=text)

    return make


def environments(count: int) -> list[dict[str, str]]:
    return [{"SLOT": str(i)} for i in range(count)]


def test_the_status_of_a_sweep_is_not_that_of_a_cell(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODERN_LLM_STATUS_FILE", str(tmp_path / "status.json"))
    cell = make("a", FINISH)
    assert run_cells([cell], environments=environments(1)) == {}
    environment = json.loads((cell.folder / "result.json").read_text())[0]
    assert environment["SLOT"] == "0" and "MODERN_LLM_STATUS_FILE" not in environment


def test_a_failing_cell_stops_nothing_and_its_reason_is_told(make: Make) -> None:
    told = "print('noise', file=sys.stderr); print('error: x.jsonl:\\n  no such file', "
    cells = [
        make("missing-data", told + "file=sys.stderr); sys.exit(3)"),
        make("first", FINISH),
        make("crash", "1 / 0"),
        make("silent", "sys.exit(1)"),
        make("killed", "os.kill(os.getpid(), 9)"),
        make("second", FINISH),
    ]

    failed = run_cells(cells, environments=environments(2))

    assert [cell.label for cell in cells if cell.finished] == ["first", "second"]
    reasons = {cell.label: failed[cell.name] for cell in cells if cell.name in failed}
    assert reasons == {
        "missing-data": "exit code 3: error: x.jsonl:   no such file",
        "crash": "exit code 1: ZeroDivisionError: division by zero",
        "silent": "exit code 1: no message",
        "killed": "exit code -9: no message",
    }


def test_a_cell_that_says_much_neither_hangs_nor_loses_its_last_line(make: Make) -> None:
    script = "for i in range(3000): print('x' * 99, file=sys.stderr)"
    script += "\nsys.exit('error: the last line')"
    cells = [make(f"chatty-{i}", script) for i in range(4)]

    failed = run_cells(cells, environments=environments(4))

    assert set(failed.values()) == {"exit code 1: error: the last line"}


def test_the_last_lines_are_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be gone before its last lines are read."""
    read = _Running._read

    def slow(one: _Running, stream: Any) -> None:
        time.sleep(0.4)
        read(one, stream)

    monkeypatch.setattr(_Running, "_read", slow)
    cell = make("quick", "sys.exit('error: told late')")

    failed = run_cells([cell], environments=environments(1))

    assert failed == {cell.name: "exit code 1: error: told late"}


def test_what_is_finished_is_not_started(make: Make, no_processes: None) -> None:
    cells = [make("a"), make("b")]
    for cell in cells:
        cell.folder.mkdir(parents=True)
        (cell.folder / "result.json").write_text("{}")

    assert run_cells(cells, environments=environments(1)) == {}


def test_only_what_is_missing_is_trained_and_that_once(make: Make) -> None:
    done, missing = make("done", "sys.exit('error: started again')"), make("missing", FINISH)
    done.folder.mkdir(parents=True)
    (done.folder / "result.json").write_text("{}")

    assert run_cells([done, missing, missing], environments=environments(2)) == {}
    assert missing.finished and (done.folder / "result.json").read_text() == "{}"


def test_as_many_run_at_once_as_there_are_environments(make: Make) -> None:
    cells = [make(f"cell-{i}", "time.sleep(0.3)" + FINISH) for i in range(5)]

    run_cells(cells, environments=environments(2))

    runs = [json.loads((cell.folder / "result.json").read_text()) for cell in cells]
    at_once = [sum(began <= at < end for _, began, end in runs) for _, at, _ in runs]
    assert max(at_once) <= 2
    assert {env["SLOT"] for env, _, _ in runs} == {"0", "1"}
    for slot in "01":  # a slot is given to one cell at a time
        own = sorted((began, end) for env, began, end in runs if env["SLOT"] == slot)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(own))


def test_past_the_budget_none_is_started_and_what_runs_ends(make: Make) -> None:
    cells = [make("a", "time.sleep(0.5)" + FINISH), make("b", FINISH), make("c", FINISH)]

    failed = run_cells(cells, environments=environments(1), until=time.monotonic() + 0.2)

    assert [cell.finished for cell in cells] == [True, False, False]
    assert failed == {
        cell.name: "not started: the budget is used up" for cell in cells if cell.label != "a"
    }
    assert run_cells(cells, environments=environments(1)) == {}, "the next call does the rest"


@pytest.fixture
def stop_when() -> Iterator[Callable[..., None]]:
    """Send this process a signal when a file is there: ``stop_when(path, signal.SIGTERM)``."""
    threads = []

    def stop(path: Path, *numbers: signal.Signals) -> None:
        def wait() -> None:
            end = time.monotonic() + 20
            while not path.exists() and time.monotonic() < end:
                time.sleep(0.01)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.2)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield stop
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_what_runs_and_the_same_call_goes_on(
    number: signal.Signals, make: Make, stop_when: Callable[..., None]
) -> None:
    cells = [make("done", FINISH), make("running", SAVE_AND_END), make("waiting", FINISH)]
    stop_when(cells[1].folder / "ready", number)

    with pytest.raises(StoppedBySignal) as stopped:
        run_cells(cells, environments=environments(1))

    assert stopped.value.exit_code == 75
    assert f"{number.name}: 1 of 3 trainings are finished" in str(stopped.value)
    child = int((cells[1].folder / "ready").read_text())
    assert (cells[1].folder / "saved").read_text() == f"{child} ", "asked once"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not cells[2].folder.exists(), "none is started after the signal"

    assert run_cells(cells, environments=environments(1)) == {}
    assert all(cell.finished for cell in cells)


def test_a_slot_that_is_free_while_others_save_stays_free(
    make: Make, stop_when: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def noted(cell: Cell, *rest: Any) -> _Running:
        started.append(cell.label)
        return start(cell, *rest)

    start = cells_module._start
    monkeypatch.setattr(cells_module, "_start", noted)
    quick = SAVE_AND_END.replace("time.sleep(0.3)", "pass")
    cells = [make("slow", SAVE_AND_END), make("quick", quick), make("waiting", FINISH)]
    stop_when(cells[0].folder / "ready", signal.SIGTERM)

    with pytest.raises(StoppedBySignal):
        run_cells(cells, environments=environments(2))

    assert started == ["slow", "quick"]


def test_a_second_ctrl_c_still_ends_the_children(
    make: Make, stop_when: Callable[..., None]
) -> None:
    slow = SAVE_AND_END.replace("time.sleep(0.3)", "time.sleep(1)")
    cell = make("slow", slow)
    stop_when(cell.folder / "ready", signal.SIGINT, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], environments=environments(1))

    with pytest.raises(ProcessLookupError):
        os.kill(int((cell.folder / "ready").read_text()), 0)


@pytest.mark.parametrize(
    ("gpus", "visible", "jobs", "devices"),
    [
        (0, None, None, [None] * 3),
        (0, None, 5, [None] * 5),
        (1, None, None, ["0"]),
        (1, None, 2, ["0", "0"]),
        (4, None, None, ["0", "1", "2", "3"]),
        (4, None, 6, ["0", "1", "2", "3", "0", "1"]),
        (4, "4,5,6,7", None, ["4", "5", "6", "7"]),
        (2, "GPU-a,GPU-b", 1, ["GPU-a"]),
    ],
)
def test_slots(
    gpus: int, visible: str | None, jobs: int | None, devices: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("modern_llm.experiments.cells.cores", lambda: 7)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    found = slots(jobs, threads=2)

    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in found] == devices
    assert all(slot["OMP_NUM_THREADS"] == "2" for slot in found)


def test_slots_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modern_llm.experiments.cells.cores", lambda: 1)

    assert len(slots(None, threads=8)) == 1, "more threads than cores are still one training"
    with pytest.raises(ConfigError, match="jobs=-1: at least 1"):
        slots(-1, threads=1)


def test_another_config_or_text_never_meets_the_files(make: Make, tmp_path: Path) -> None:
    cell = make("a")
    others = [
        make("a", model__n_layers=2), make("a", seed=1), make("a", pretrain__training__lr=1e-5),
        make("a", text="other"), make("b"),
    ]  # fmt: skip

    assert len({one.folder for one in [cell, *others]}) == 1 + len(others)
    assert cell.name.startswith("a-") and make("a").folder == cell.folder


def test_logging_and_place_are_the_same_cell_and_still_heeded(make: Make, tmp_path: Path) -> None:
    """A file of the first call must not decide where, or how often, the second writes."""
    cell = make("a")
    again = make("a", pretrain__training__save_every=7, paths__output=str(tmp_path / "moved"))
    logged = make("a", pretrain__training__save_every=7)

    assert cell.name == again.name == logged.name
    for one in (cell, again, logged):
        words = one.command()
        file = Path(words[words.index("--config") + 1])
        config = load_config(str(file))
        assert config.name == cell.name and config.sha256() == cell.config.sha256()
        assert config.paths.output == one.config.paths.output
        training = config.pretrain.training
        assert training.save_every == one.config.pretrain.training.save_every
    assert cell.command() == cell.command()

import json
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from modern_llm.errors import StoppedBySignal
from modern_llm.runtime.artifacts import JsonLines
from modern_llm.training import LMObjective, Terms, Trainer, check_run_record, progress
from modern_llm.training.progress import RunLog, describe

Rows = list[dict[str, Any]]
TRAIN = {
    "step": 7, "loss": 1.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 99, "units": 9,
    "tokens_per_s": 1234.5, "mfu": None, "memory_gb": 0.25,
}  # fmt: skip


class Interrupt(LMObjective):
    """SIGTERM in the sixth step."""

    calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        self.calls += 1
        if self.calls == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(model, batch)


@pytest.fixture
def log(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Path:
    """The log of a run that was stopped once and went on."""
    folder = tmp_path / "pretrain"
    with pytest.raises(StoppedBySignal):
        make_trainer(folder, objective=Interrupt(), evaluate=lambda m: {"loss": 2.0}).fit()
    make_trainer(folder, evaluate=lambda m: {"loss": 2.0}).fit()
    return folder / "metrics.jsonl"


def test_a_run_with_a_restart_has_a_sound_record(log: Path) -> None:
    assert check_run_record(log) == []


def drop_start(rows: Rows) -> None:
    rows.pop(0)


def repeat_step(rows: Rows) -> None:
    rows.insert(-1, next(row for row in rows if row["kind"] == "train"))


def unfinished(rows: Rows) -> None:
    rows.pop()


def no_versions(rows: Rows) -> None:
    del rows[0]["versions"]


def other_data(rows: Rows) -> None:
    next(r for r in rows[1:] if r["kind"] == "start")["data_fingerprint"] = "else"


def lost_loss(rows: Rows) -> None:
    next(row for row in rows if row["kind"] == "train")["loss"] = None


def wrong_resume(rows: Rows) -> None:
    next(r for r in rows[1:] if r["kind"] == "start")["resumed_from"] = "step-00000004"


def fewer_tokens(rows: Rows) -> None:
    [row for row in rows if row["kind"] == "train"][3]["tokens"] = 1


def strange_kind(rows: Rows) -> None:
    rows[2]["kind"] = "note"


def no_norm(rows: Rows) -> None:
    del next(row for row in rows if row["kind"] == "train")["grad_norm"]


@pytest.mark.parametrize(
    ("defect", "told"),
    [
        (drop_start, "does not begin with a start"),
        (repeat_step, "train step 1 comes after step 12"),
        (unfinished, "does not say that the run finished"),
        (no_versions, "start without versions"),
        (other_data, "the data is not what the run began with"),
        (lost_loss, "the loss is not a number"),
        (wrong_resume, "starts at step 6, but says it resumed step-00000004"),
        (fewer_tokens, "tokens do not grow"),
        (strange_kind, "line 3: not a row of a run"),
        (no_norm, "train row without grad_norm"),
    ],
)
def test_seeded_defects_are_found(log: Path, defect: Callable[[Rows], None], told: str) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    defect(rows)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any(told in problem for problem in check_run_record(log))


def test_an_empty_or_torn_record(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"kind": "tr')
    assert check_run_record(tmp_path / "m.jsonl") == ["line 1: not a row of a run", "no rows"]


def test_one_line_says_how_it_goes() -> None:
    line = describe({**TRAIN, "mfu": None})
    assert line == "loss 1.5000  lr 1.00e-03  1,234 tok/s  MFU n/a  0.25 GB"
    assert "MFU 41.5%" in describe({**TRAIN, "mfu": 0.415})


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="modern_llm"):
        with RunLog(JsonLines(tmp_path / "a.jsonl"), title="sft", total_steps=10) as told:
            told.train(TRAIN, eta_s=3725.4)
        assert "sft 7/10  loss 1.5000" in caplog.text
        assert "ETA 1:02:05" in caplog.text
        caplog.clear()

        terminal = Console(force_terminal=True, width=140, file=(tmp_path / "screen").open("w"))
        monkeypatch.setattr(progress, "console", terminal)
        with RunLog(JsonLines(tmp_path / "b.jsonl"), title="sft", total_steps=10) as told:
            told.train(TRAIN, eta_s=3.0)
        assert "sft 7/10" not in caplog.text
    terminal.file.close()
    screen = (tmp_path / "screen").read_text()
    assert "7/10" in screen
    assert "loss 1.5000" in screen
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_a_loss_that_is_no_number_is_null_in_the_file(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "m.jsonl")
    RunLog(rows, title="sft", total_steps=1).evaluation({"step": 0, "loss": math.nan})
    assert json.loads((tmp_path / "m.jsonl").read_text())["loss"] is None

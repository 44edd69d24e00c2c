import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from modern_llm.config import TrainingConfig
from modern_llm.runtime.artifacts import JsonLines
from modern_llm.training import progress
from modern_llm.training.progress import RunLog, describe, train_row
from modern_llm.training.records import Progress, StepStats, perplexity
from modern_llm.training.throughput import Work

TRAIN: dict[str, Any] = {
    "step": 7, "loss": 1.5, "perplexity": 4.4817, "lr": 1e-3, "grad_norm": 0.5, "tokens": 99,
    "units": 9, "tokens_per_s": 1234.5, "step_s": 0.08, "tflops": 0.0123, "mfu": None,
    "memory_gb": 0.25, "memory_peak_gb": 0.5,
}  # fmt: skip


def config(max_steps: int) -> TrainingConfig:
    return TrainingConfig(max_steps=max_steps, seq_len=8)


def test_one_line_says_how_it_goes() -> None:
    assert describe(TRAIN) == (
        "loss 1.5000  ppl 4.48  lr 1.00e-03  grad 0.5  0.08 s/step  1,234 tok/s  0.0123 TFLOP/s  "
        "MFU n/a  0.25 GB (peak 0.50)"
    )
    assert "MFU 41.5%" in describe({**TRAIN, "mfu": 0.415})
    pairs = {key: value for key, value in TRAIN.items() if key != "perplexity"}
    assert "ppl" not in describe(pairs)
    assert "TFLOP" not in describe({**TRAIN, "tflops": None})


def row(**changes: Any) -> dict[str, Any]:
    """A row of a step after one that was told: 400 tokens, 100 scored, in 2 s and 4 steps."""
    stats = StepStats(2.0, 0.5, 1e-3, 90, 100, 30, {"accuracy": torch.tensor(0.25)})
    last = Progress(step=6, tokens=600, units=540, scored=150, seconds=10.0)
    now = Progress(step=10, tokens=1000, units=900, scored=250, seconds=12.0)
    options = {"likelihood": True, "work": Work(2e9, 4e9), "peak": 1.2e12, **changes}
    return train_row(stats, now, last, **options)


def test_speed_is_that_since_the_last_row() -> None:
    told = row()
    assert (told["step"], told["tokens"], told["units"]) == (10, 1000, 900)
    assert told["tokens_per_s"] == 200.0
    assert told["step_s"] == 0.5
    assert told["tflops"] == pytest.approx(0.6)  # 200 tokens of 2 GFLOP and 50 of 4 a second
    assert told["mfu"] == pytest.approx(0.5)
    assert told["accuracy"] == 0.25
    assert told["perplexity"] == pytest.approx(7.38905609893065)
    assert "perplexity" not in row(likelihood=False)
    assert row(peak=None)["mfu"] is None
    assert row(peak=None)["tflops"] == pytest.approx(0.6)
    assert row(work=None)["tflops"] is row(work=None)["mfu"] is None


def test_a_perplexity_that_no_float_can_hold_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert math.isfinite(perplexity(709.0))
    assert perplexity(710.0) == perplexity(1e9) == math.inf


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="modern_llm"):
        with RunLog(JsonLines(tmp_path / "a.jsonl"), title="sft", config=config(10)) as told:
            told.train(TRAIN, eta_s=3725.4)
        assert "sft 7/10  loss 1.5000" in caplog.text
        assert "ETA 1:02:05" in caplog.text
        caplog.clear()

        terminal = Console(force_terminal=True, width=140, file=(tmp_path / "screen").open("w"))
        monkeypatch.setattr(progress, "console", terminal)
        with RunLog(JsonLines(tmp_path / "b.jsonl"), title="sft", config=config(10)) as told:
            told.train(TRAIN, eta_s=3.0)
        assert "sft 7/10" not in caplog.text
    terminal.file.close()
    screen = (tmp_path / "screen").read_text()
    assert "7/10" in screen
    assert "loss 1.5000" in screen
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_a_loss_that_is_no_number_is_null_in_the_file(tmp_path: Path) -> None:
    rows = JsonLines(tmp_path / "m.jsonl")
    RunLog(rows, title="sft", config=config(1)).evaluation({"step": 0, "loss": math.nan})
    assert json.loads((tmp_path / "m.jsonl").read_text())["loss"] is None


def test_trackers_get_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart repeats steps whose rows stand; a tracker must not count them twice."""
    kept: list[tuple[str, int]] = []

    class Noted:
        def __init__(self, names: Any, *, folder: Path, run: str) -> None:
            assert (tuple(names), folder) == (("tensorboard",), tmp_path)

        def log(self, kind: str, row: dict[str, Any]) -> None:
            kept.append((kind, row["step"]))

        def close(self) -> None:
            kept.append(("closed", 0))

    monkeypatch.setattr(progress, "Trackers", Noted)
    settings = config(10).model_copy(update={"trackers": ("tensorboard",)})
    for steps in ((5, 6), (6, 7)):
        with RunLog(JsonLines(tmp_path / "m.jsonl"), title="sft", config=settings) as told:
            for step in steps:
                told.train({**TRAIN, "step": step}, eta_s=1.0)
            told.evaluation({"step": steps[-1], "loss": 1.0})
    trains = [("train", 5), ("train", 6), ("eval", 6), ("closed", 0), ("train", 7), ("eval", 7)]
    assert kept == [*trains, ("closed", 0)]

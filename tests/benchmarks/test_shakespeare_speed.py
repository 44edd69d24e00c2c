"""The race to 1.88 runs both presets, tells what missed it, and writes its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MODERN_LLM_DATA") or ROOT.parent / "shared" / "data")
HAS_TEXT = (DATA / "tinyshakespeare" / "input.txt").is_file()
PRESETS = ["nanogpt-cpu", "speed"]


@pytest.mark.skipif(not HAS_TEXT, reason="needs tinyshakespeare/input.txt below MODERN_LLM_DATA")
def test_two_steps_of_both_presets_miss_and_say_so(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "shakespeare_speed.py"), "--rounds", "1"]
    options = ["--max-steps", "2", "--threads", "1", "--json", str(tmp_path / "out.json")]
    tiny = ["model.d_model=16", "model.n_layers=1", f"data.root={DATA}"]
    done = subprocess.run([*command, *options, *tiny], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert [run["preset"] for run in record["runs"]] == PRESETS == list(record["table"])
    for preset in PRESETS:
        row = record["table"][preset]
        assert f"{preset}: 1 of 1 runs missed a loss of 1.88" in done.stdout
        assert row["steps"] == 2 and row["least_loss"] == row["loss"] == row["largest_loss"] > 1.88
        assert 0 < row["train_s"] < row["process_s"] and row["processor_s"] > 0
    assert record["table"]["speed"]["train_s_over_ours"] == 1.0


def test_without_the_text_one_message(tmp_path: Path) -> None:
    own = {**os.environ, "MODERN_LLM_DATA": str(tmp_path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "shakespeare_speed.py"), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert done.returncode == 1
    assert done.stderr.startswith("error: tinyshakespeare: put input.txt into")
    assert len(done.stderr.splitlines()) == 1

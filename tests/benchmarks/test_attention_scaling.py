"""The scaling benchmark measures every point, and counts what grows linearly and what does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--window", "32", "--d-model", "32", "--n-heads", "2", "--threads", "1"]
QUICK = ["--rounds", "1", "--repeats", "1"]


def run(tmp_path: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What it prints, and what it writes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "attention_scaling.py"), *TINY, *QUICK]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    done = subprocess.run([*command, *options, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "out.json").read_text())


def curve(record: dict[str, Any], measured: str, name: str, kind: str) -> dict[str, Any]:
    key = {"measured": measured, "pass": name, "kind": kind}
    [found] = [c for c in record["curves"] if key.items() <= c.items()]
    return found


def test_counted_work_and_the_table(tmp_path: Path) -> None:
    """FLOPs a + b T + c T^2: c is 0 of linear and window attention, and not of full attention."""
    lengths = [256, 512, 1024]
    options = ["--passes", "forward", "--lengths", *map(str, lengths)]
    printed, record = run(tmp_path, *options)
    square = {}
    for kind in ("full", "window", "linear"):
        flops = curve(record, "flops", "forward", kind)
        a, b, c = flops["values"]
        square[kind] = (c - b) - 2 * (b - a)
        slope = np.polyfit(np.log(lengths), np.log(flops["values"]), 1)[0]
        assert flops["exponent"] == pytest.approx(slope)
        assert flops["growth"] == pytest.approx([b / a, c / b])
    assert square["linear"] == square["window"] == 0
    assert square["full"] == 4 * 32 * (1024**2 - 3 * 512**2 + 2 * 256**2)  # 4 D for each pair
    assert curve(record, "flops", "forward", "linear")["exponent"] == pytest.approx(1)

    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()]
    assert rows[0][2:] == ["T=256", "T=512", "T=1024", "256 to 512", "512 to 1024", "exponent"]
    assert {len(row) for row in rows} == {8}
    assert len(rows) == 2 + 3 * 3  # three kinds; time, memory and FLOPs
    assert len(record["rows"]) == 9
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 for row in record["rows"])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_decoding_and_training(tmp_path: Path) -> None:
    passes = ["--passes", "training", "decode", "stream"]
    _, record = run(tmp_path, *passes, "--lengths", "128", "64", "--kinds", "window", "linear")
    kept = {
        (name, kind): curve(record, "state_bytes", name, kind)["values"]
        for name, kind in (("decode", "window"), ("decode", "linear"), ("stream", "window"))
    }
    assert kept["stream", "window"] == [2 * 4 * 32 * 32] * 2  # keys and values of the window
    assert kept["decode", "linear"] == [4 * 2 * (16 * 16 + 16)] * 2
    assert kept["decode", "window"] == [2 * 4 * 32 * (n + 24) for n in (64, 128)]
    training = curve(record, "flops", "training", "linear")
    assert training["growth"] == [2.0] and training["lengths"] == [64, 128]
    assert record["options"]["window"] == 32 and record["versions"]["torch"]


def test_a_clock_that_cannot_be_read_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "attention_scaling.py"), "--clock", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--threads 1" in done.stderr

"""The benchmark of the chunked loss measures every case, and a chunk takes less memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_case_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chunked_loss.py"), "--threads", "1"]
    sizes = ["--tokens", "2048", "--vocab", "8192", "--width", "16", "--chunks", "128"]
    options = ["--rounds", "1", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *sizes, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out.json").read_text())["table"]
    cases = [(row["precision"], row["case"]) for row in table]
    assert cases == [(p, c) for p in ("fp32", "bf16") for c in ("whole", "128")]
    assert [row["ratio"] for row in table[::2]] == [1.0, 1.0]
    assert all(row["seconds"] > 0 for row in table)
    logits_gb = 2048 * 8192 / 1e9
    for whole, chunked in (table[:2], table[2:]):  # bytes of a logit, of all or of a chunk
        assert whole["peak_gb"] / logits_gb == pytest.approx(12, rel=0.05)
        assert chunked["peak_gb"] / (logits_gb / 16) < 14
    assert len(done.stdout.splitlines()) == 2 + len(table)

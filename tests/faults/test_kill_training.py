import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("kill_runner.py")
KILLS = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(tmp_path), str(KILLS), "11"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report["kills"]) == KILLS
    assert len(set(report["kills"])) > 4  # at any moment, and at points inside a save
    for run in report["runs"]:
        assert run["weights"] == report["whole"]["weights"]
        assert run["rows"] == report["whole"]["rows"]
        assert run["left"] == []
        assert run["checkpoints"][-1] == "step-00000060"
    assert sum(run["starts"] for run in report["runs"]) > KILLS // 2

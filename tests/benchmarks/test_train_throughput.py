"""The speed benchmark runs its contestants, names absent peers and writes its table."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark_of_a_tiny_model(tmp_path: Path) -> None:
    model = {"vocab_size": 384, "d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    config = {
        "extends": str(ROOT / "benchmarks" / "train_10m.json"),
        "model": {**model, "d_ff": 64, "max_seq_len": 128},
        "training": {"batch_size": 2, "seq_len": 32, "compile": False},
        "data": {"cache_dir": str(tmp_path / "cache")},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "benchmarks" / "train_throughput.py")]
    options = ["--only", "litgpt", "--rounds", "2", "--steps", "1", "--threads", "1"]
    files = ["--config", str(tmp_path / "tiny.json"), "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *options, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "litgpt bf16-true: not installed" in done.stdout
    table = json.loads((tmp_path / "out.json").read_text())
    assert table["modern_llm"]["tokens_per_s"] > 0
    assert table["modern_llm"]["ours_over_it"] == 1.0

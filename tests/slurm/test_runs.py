"""Real training by the submit scripts on a real SLURM: two tasks, stopped and gone on."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TWO = ("--ntasks=2",)
STEPS = {"pretrain": 300, "sft": 4, "dpo": 3, "verifier": 3}


def rows(run: Path, stage: str) -> int:
    """Rows that a stage has logged."""
    path = run / stage / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def weights(run: Path, stage: str) -> str:
    return hashlib.sha256((run / stage / "final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def variables(tmp_path: Path, write_tiny: Callable[..., Path]) -> dict[str, str]:
    """What the scripts take for the tiny config, long enough to be stopped in its middle."""
    changes: dict[str, Any] = {"training.micro_batch_size": 2, "pretrain.training.eval_every": 0}
    changes |= {f"{stage}.training.max_steps": steps for stage, steps in STEPS.items()}
    changes |= {"pretrain.training.save_every": 1000, "rank_timeout_s": 60}
    config = write_tiny(tmp_path, changes)
    return {"PRESET": str(config), "OUTPUT_DIR": str(tmp_path / "out")}


def test_every_script_trains_the_same_weights_however_it_is_stopped(
    cluster: Any, variables: dict[str, str], tmp_path: Path
) -> None:
    """The whole pipeline undisturbed; by torchrun and USR1; a requeue, then stage by stage."""
    out = Path(variables["OUTPUT_DIR"])
    whole = cluster.submit("submit_smoke_test.sh", **variables, RUN_NAME="whole")
    apart = cluster.submit("submit_pretrain_only.sh", flags=TWO, **variables, RUN_NAME="apart")
    after = [f"--dependency=afterok:{apart}", "--kill-on-invalid-dep=yes", *TWO]
    aligned = cluster.submit(
        "submit_alignment.sh", flags=tuple(after), **variables, RUN_NAME="apart"
    )
    scored = cluster.submit(
        "submit_eval.sh", flags=(f"--dependency=afterok:{aligned}",), **variables, RUN_NAME="apart"
    )
    torchrun = cluster.submit(
        "submit_speedrun.sh", flags=TWO, **variables, RUN_NAME="torchrun", LAUNCHER="torchrun"
    )
    stops = {apart: ("scontrol", "requeue"), torchrun: ("scancel", "--signal=USR1")}
    names = {apart: "apart", torchrun: "torchrun"}
    waiting, end = dict(stops), time.monotonic() + 120
    while waiting and time.monotonic() < end:
        for job in [job for job in waiting if rows(out / names[job], "pretrain") >= 20]:
            cluster.ask(*waiting.pop(job), job)
        time.sleep(0.1)
    assert not waiting, [cluster.log(job) for job in waiting]

    for job in (whole, apart, aligned, scored, torchrun):
        ended = cluster.ended(job, timeout_s=240)
        assert (ended.state, ended.code) == ("COMPLETED", 0), cluster.log(job)
        assert ended.restarts == (1 if job in stops else 0), cluster.log(job)
    for job, name in names.items():
        told = [json.loads(line) for line in (out / name / "pretrain" / "metrics.jsonl").open()]
        assert sum(row["kind"] == "start" for row in told) == 2, "it was stopped in its middle"
        assert "checking" in cluster.log(job)
    for stage in STEPS:
        assert weights(out / "apart", stage) == weights(out / "whole", stage), stage
        assert weights(out / "torchrun", stage) == weights(out / "whole", stage), stage
    for name in ("whole", "apart", "torchrun"):
        assert (out / name / "eval" / "result.json").is_file()


PACED = """
import os, time
from modern_llm.training.schedule import SCHEDULES

@SCHEDULES.register("paced")
def paced(progress: float, floor: float) -> float:
    time.sleep(float(os.environ["PACE_S"]))
    return 1.0
"""


def test_a_job_out_of_time_goes_on_in_its_next_start(
    cluster: Any, variables: dict[str, str], tmp_path: Path
) -> None:
    """A minute is the shortest limit that there is; the steps take longer than that together."""
    plugin = tmp_path / "paced.py"
    plugin.write_text(PACED)
    words = ("pretrain.training.schedule=paced", "pretrain.training.max_steps=50")
    words += ("pretrain.training.warmup=0", f"--plugin={plugin}")
    jobs = {}
    for name, pace_s, limit in (("hurried", "0", "5"), ("limited", "1.2", "1")):
        jobs[name] = cluster.submit(
            "submit_pretrain_only.sh", *words, flags=(*TWO, f"--time={limit}", "--signal=USR1@20"),
            **variables, RUN_NAME=name, PACE_S=pace_s,
        )  # fmt: skip
    for name, job in jobs.items():
        ended = cluster.ended(job, timeout_s=240)
        assert (ended.state, ended.code) == ("COMPLETED", 0), cluster.log(job)
        assert ended.restarts >= (1 if name == "limited" else 0), cluster.log(job)
    assert "stopped by a signal after saving" in cluster.log(jobs["limited"])
    out = Path(variables["OUTPUT_DIR"])
    assert weights(out / "limited", "pretrain") == weights(out / "hurried", "pretrain")


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [
        ("model.d_model=33", 2, "d_model"),
        ("training.micro_batch_size=4", 2, "micro_batch_size"),
        ('pretrain.data=[{"name":"jsonl","path":"no such.jsonl"}]', 3, "no such.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_within_seconds(
    word: str, code: int, message: str, cluster: Any, variables: dict[str, str], tmp_path: Path
) -> None:
    begin = time.monotonic()
    job = cluster.submit("submit_pretrain_only.sh", word, flags=TWO, **variables)
    ended = cluster.ended(job)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", code, 0), cluster.log(job)
    assert message in cluster.log(job)
    assert "Traceback" not in cluster.log(job)
    assert not (tmp_path / "out" / "tiny").exists(), "nothing was begun"
    assert time.monotonic() - begin < 30


def test_a_limit_below_the_estimate_is_told(cluster: Any, variables: dict[str, str]) -> None:
    refused = cluster.run(
        "bash", "slurm/submit_pretrain_only.sh", "training.max_steps=100000", "--partition=nowhere",
        **variables, TIME_LIMIT="1",
    )  # fmt: skip
    assert "this takes a chain of" in refused.stdout
    assert "invalid partition" in refused.stderr


def test_a_sweep_is_an_array_and_a_comparison(cluster: Any, tmp_path: Path) -> None:
    text = {"name": "synthetic", "kind": "text", "rows": 200, "held_out_rows": 8}
    study = {
        "base": "gpt2",
        "arms": {"plain": {}, "rms": {"model.norm": "rmsnorm"}},
        "seeds": [0],
        "overrides": {
            **{"model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2},
            **{"model.max_seq_len": 32, "model.vocab_size": 300, "tokenizer.name": "bpe"},
            **{"pretrain.data": [text], "pretrain.training.max_steps": 6},
            **{"pretrain.training.batch_size": 4, "pretrain.training.micro_batch_size": 4},
            **{"pretrain.training.warmup": 0, "pretrain.training.eval_every": 3},
            **{"training.device": "cpu", "training.precision": "fp32"},
            **{"data.cache_dir": str(tmp_path / "cache")},
        },
    }
    (tmp_path / "small.json").write_text(json.dumps(study))
    submitted = cluster.run(
        "bash", "slurm/submit_sweep.sh", "--array=1-2", f"--output={tmp_path}/%a-%j.log",
        STUDY=str(tmp_path / "small.json"), OUTPUT_DIR=str(tmp_path / "out"),
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    comparison = int(submitted.stdout.split()[-1])
    ended = cluster.ended(comparison, timeout_s=180)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert (ended.state, ended.code) == ("COMPLETED", 0), logs
    for share in (1, 2):
        assert any(f"share {share} of 2: 1 cells, 0 failed" in log for log in logs.values())
    assert "2 of 2 trainings are finished already" in logs[f"1-{comparison}.log"]
    assert (tmp_path / "out" / "small" / "comparison" / "report.md").is_file()

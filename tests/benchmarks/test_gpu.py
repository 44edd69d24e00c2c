"""The GPU benchmark runs all its parts on a CPU, keeps its limits, and says what failed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--device", "cpu", "--sizes", "tiny", "--no-compile"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=own)


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path: Path) -> None:
    done = run(*TOY, "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["command"].startswith("python benchmarks/gpu.py --device cpu")
    assert record["card"]["device"] == "cpu" and record["card"]["torch"] == torch.__version__
    assert record["time"] and record["versions"]["torch"]

    parts = {part["name"]: part for part in record["parts"]}
    far = parts["agreement"]["largest_relative_difference"]
    assert far["fp32 from cpu fp32"] == 0.0  # the same device here
    assert far.keys() <= record["tolerances"].keys()
    losses = parts["agreement"]["losses"]["cpu fp32"]
    assert losses[-1] < losses[0] - 0.1  # steps that learn: a wrong gradient would show
    for preset in ("gpt2-full", "tacc"):
        whole, chunked = (parts[f"train {preset}, {kind} loss"] for kind in ("whole", "chunked"))
        assert (whole["loss_chunk"], chunked["loss_chunk"]) == (0, 64)
        for part in (whole, chunked):
            assert part["micro_batch_rows"] == 8 and part["fused_adamw"]
            assert part["tokens_per_s"] == pytest.approx(part["tokens"] / part["seconds"])
            assert part["tokens"] == part["steps"] * part["step_rows"] * part["seq_len"]
            flops = 1e12 * part["tflops_per_s"]
            assert part["mfu"] == pytest.approx(flops / part["peak"]["flops"])
            assert f"{part['tokens_per_s']:,.0f} tokens/s" in done.stdout
    dpo = parts["dpo tacc"]
    assert dpo["pairs_per_s"] == pytest.approx(dpo["units"] / dpo["seconds"])
    assert dpo["reference_pairs_per_s"] > 0
    assert [s["batch_size"] for s in parts["decode tacc"]["speeds"]] == [1, 32]


def test_without_a_gpu_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA device here")
    assert len(done.stderr.splitlines()) == 1


def test_what_finds_no_time_is_said(tmp_path: Path) -> None:
    done = run(*TOY, "--results", str(tmp_path), "--limit-s", "0")
    assert done.returncode == 1
    assert done.stdout.count("FAILED: no time was left") == 7
    [path] = tmp_path.glob("*.json")
    assert {p["failed"] for p in json.loads(path.read_text())["parts"]} == {"no time was left"}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """``gpu`` and ``gpu_parts``, as the script imports them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_parts

    yield gpu, gpu_parts
    for name in ("gpu", "gpu_parts", "gpu_data"):
        sys.modules.pop(name)


def test_the_budgets_are_within_eight_minutes(modules: Any) -> None:
    gpu, _ = modules
    assert sum(part.budget_s for part in gpu.PARTS) <= gpu.LIMIT_S == 480


def test_a_part_that_hangs_is_killed(
    modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu, _ = modules
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(sys, "argv", ["gpu.py", *TOY])
    begin = time.perf_counter()
    found = gpu.child(gpu.parse(), "decode", seconds=1.0)
    assert found == {"failed": "not done within its 1 s"}
    assert time.perf_counter() - begin < 20

    script.write_text("raise SystemExit('error: why')\n")
    found = gpu.child(gpu.parse(), "decode", seconds=30.0)
    assert found == {"failed": "exit code 1: error: why"}


def test_losses_that_are_too_far_apart_fail(modules: Any) -> None:
    gpu, _ = modules
    row = {"name": "agreement", "kind": "agreement", "wall_s": 1.0}
    near = {**row, "largest_relative_difference": {"fp32 from cpu fp32": 1e-5}}
    far = {**row, "largest_relative_difference": {"fp32 from cpu fp32": 1e-3}}
    assert gpu.all_is_well([near]) and not gpu.all_is_well([near, far])
    assert not gpu.all_is_well([near, {**row, "failed": "why"}])
    assert "TOO FAR" in gpu.line_of(far) and "TOO FAR" not in gpu.line_of(near)


def test_the_largest_micro_batch_that_fits(modules: Any) -> None:
    _, parts = modules
    choices = [1, 2, 4, 5, 10]
    assert parts.fitting_rows(choices, room_gb=10.0, row_gb=2.0) == 5
    assert parts.fitting_rows(choices, room_gb=100.0, row_gb=2.0) == 10
    assert parts.fitting_rows(choices, room_gb=1.0, row_gb=2.0) == 1


def test_fused_kernels_are_asked_for_each_kind_of_call(modules: Any) -> None:
    _, parts = modules
    kinds = ["causal", "masked", "causal, grouped heads", "masked, grouped heads"]
    found = parts.attention_kernels(torch.device("cpu"))
    assert list(found) == kinds
    assert not any(found.values())  # they are of a GPU


def test_out_of_memory_takes_half_the_rows(
    modules: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, parts = modules
    before = parts.timed_steps

    def refuses(trainer: Any, job: Any) -> dict[str, Any]:
        if trainer.config.micro_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return before(trainer, job)

    monkeypatch.setattr(parts, "timed_steps", refuses)
    sizes, end = parts.SIZES["tiny"], time.perf_counter() + 60
    job = parts.Job("tacc", torch.device("cpu"), "fp32", False, sizes, tmp_path, end)
    found = parts.train(job, chunked=True)
    assert found["micro_batch_rows"] == 2 and found["did_not_fit_rows"] == [8, 4]
    assert found["step_rows"] == 8  # four micro-batches

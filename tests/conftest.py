"""One very small pipeline for all tests that need a whole run: written once, trained once."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

TINY: dict[str, Any] = {
    "description": "All stages in seconds, to be tested with.",
    "model": {"vocab_size": 512, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 128},
    "tokenizer": {"name": "bpe", "max_train_mb": 1},
    "training": {
        **{"max_steps": 3, "batch_size": 4, "lr": 1e-3, "log_every": 1, "save_every": 2},
        **{"device": "cpu", "threads": 1},
    },
    "pretrain": {
        "data": [{"name": "synthetic", "kind": "text", "rows": 200, "held_out_rows": 8}],
        "training": {"max_steps": 4, "eval_every": 2},
    },
    "sft": {"data": [{"name": "synthetic", "kind": "problems", "rows": 120, "held_out_rows": 8}]},
    "dpo": {
        "data": [{"name": "synthetic", "kind": "pairs", "rows": 40, "held_out_rows": 8}],
        **{"max_prompt_tokens": 64, "max_answer_tokens": 16},
    },
    "verifier": {
        "data": [{"name": "synthetic", "kind": "problems", "rows": 120, "held_out_rows": 8}],
        **{"n_problems": 6, "n_validation_problems": 4, "samples_per_problem": 2},
        **{"max_new_tokens": 8},
    },
    "eval": {
        "perplexity": [
            {"source": {"name": "synthetic", "kind": "text", "rows": 200, "held_out_rows": 8}}
        ],
        "reasoning": {
            "source": {"name": "synthetic", "kind": "problems", "rows": 120, "held_out_rows": 8},
            **{"n_problems": 4, "n_samples": 2, "max_new_tokens": 8},
        },
        "preference": {
            "source": {"name": "synthetic", "kind": "pairs", "rows": 40, "held_out_rows": 8}
        },
        **{"prompts": ["Say hello."], "completions": ["The"]},
        **{"sample_tokens": 4, "batch_size": 8, "device": "cpu", "threads": 1},
    },
}
STAGES = ("pretrain", "sft", "dpo", "verifier", "eval")


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``config`` with dotted keys set: ``{"model.d_model": 64}``."""
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for dotted, value in changes.items():
        *sections, last = dotted.split(".")
        place: Any = result
        for key in sections:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = value
    return result


@dataclass(frozen=True)
class TinyRun:
    """A finished run of all stages; read it, copy it, never change it.

    Attributes:
        run: its folder; ``run / stage / "final"`` is the checkpoint of a stage.
        config: path of its config file, which can be run again with other paths.
        arguments: of the command line that made it, after ``modern-llm run``.
        raw: content of the config file.
    """

    run: Path
    config: Path
    arguments: tuple[str, ...]
    raw: dict[str, Any]


def tiny_config(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the tiny config with all its paths below ``folder``; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"output": "runs", "report": "report", "ledger": "ledger.jsonl"}
    places = {f"paths.{key}": str(folder / value) for key, value in paths.items()}
    raw = changed(TINY, {**places, "data.cache_dir": str(folder / "cache"), **(changes or {})})
    path = folder / "tiny.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., Path]:
    """`tiny_config` itself: ``write_tiny(folder, {"model.d_model": 64}) -> path``."""
    return tiny_config


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny config of the test's own: ``make_tiny({"model.d_model": 64}) -> path``."""

    def make(changes: Mapping[str, Any] | None = None, *, folder: Path | None = None) -> Path:
        return tiny_config(folder or tmp_path, changes)

    return make


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny pipeline, run once through the command line with every stage and the report."""
    from modern_llm.cli import main

    config = tiny_config(tmp_path_factory.mktemp("tiny"))
    arguments = ("--config", str(config))
    assert main(["run", *arguments]) == 0
    run = config.parent / "runs" / "tiny"
    return TinyRun(run, config, arguments, json.loads(config.read_text()))


@pytest.fixture
def cli() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run the command line in a process of its own, with one thread and no data root.

    ``cli("run", "--config", path, cwd=folder, env={...}, timeout=60)``; its first argument is a
    command of ``modern-llm`` or the path of a script.
    """

    def call(
        command: str,
        *arguments: object,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        prefix: Sequence[str] = (),
    ) -> "subprocess.CompletedProcess[str]":
        program = [command] if command.endswith(".py") else ["-m", "modern_llm", command]
        own = {k: v for k, v in os.environ.items() if k != "MODERN_LLM_DATA"}
        own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"}
        return subprocess.run(
            [*prefix, sys.executable, *program, *map(str, arguments)],
            cwd=cwd, env={**own, **(env or {})}, timeout=timeout, capture_output=True, text=True,
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Any]:
    """Result of an experiment without training: ``make_result("wide", {0: 3.1, 1: 3.2})``.

    Its keywords replace fields of every seed, of ``data``, or of the result.
    """
    from dataclasses import fields

    from modern_llm.experiments.results import ExperimentResult, Point, SeedResult

    data = {"train_tokens": 5000, "train_sha256": "a" * 64, "validation_bytes": 1700}
    data |= {"validation_sha256": "b" * 64, "tokenizer_sha256": "c" * 64}

    def seed_result(seed: int, loss: float, changes: dict[str, Any]) -> SeedResult:
        curve = tuple(Point(step, 128 * step, 0.5 * step, loss + 1 / (step + 1)) for step in (0, 5))
        own: dict[str, Any] = {"seed": seed, "run": f"runs/seed{seed}", "sha256": f"{seed:064d}"}
        own |= {"steps": 10, "tokens": 1280, "final_val_loss": loss, "bits_per_byte": loss / 2}
        own |= {"train_time_s": 5.0, "epoch_time_s": 20.0, "tokens_per_s": 256.0 + seed}
        own |= {"mfu": None, "peak_memory_mb": 300.0, "model_size_mb": 0.4}
        own |= {"prefill_tokens_per_s": 900.0, "inference_tokens_per_s": 90.0}
        own |= {"first_token_s": 0.01, "curve": (*curve, Point(10, 1280, 5.0, loss))}
        return SeedResult(**(own | changes))

    def make(name: str, losses: Mapping[int, float], **changes: Any) -> ExperimentResult:
        of_seeds = {field.name for field in fields(SeedResult)}
        own: dict[str, Any] = {"name": name, "summary": "1L-2H-16D", "params": 9000}
        own |= {"active_params": 9000, "flops_per_token": 54_000.0, "failed": {}}
        own["hardware"] = {"cpu": "a CPU", "threads": 1, "gpus": []}
        own["config"] = {"pretrain": {"training": {"seq_len": 32}}}
        own["data"] = data | {key: changes[key] for key in data if key in changes}
        each = {key: value for key, value in changes.items() if key in of_seeds}
        own["seeds"] = tuple(seed_result(seed, loss, each) for seed, loss in losses.items())
        rest = {key: value for key, value in changes.items() if key not in {*each, *data}}
        return ExperimentResult(**(own | rest))

    return make


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a disk of its own, ``make_disk(kb=100)`` or ``make_disk(read_only=True)``, or skip."""
    mounted: list[Path] = []

    def make(*, kb: int = 1000, read_only: bool = False) -> Path:
        disk = tmp_path / f"disk-{len(mounted)}"
        disk.mkdir()
        options = f"size={kb}k" + (",ro" if read_only else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        try:
            refused = subprocess.run(command, capture_output=True).returncode != 0
        except FileNotFoundError:
            refused = True
        if refused:
            pytest.skip("mounting a disk needs root on Linux")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def metric_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place of its own for the scripts of ``evaluate``, which imports them as one package.

    Python keeps that package: a second place would not be looked into in the same process.
    """

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
            del sys.modules[name]

    config = pytest.importorskip("evaluate").config
    monkeypatch.setattr(config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield
    forget()

"""Lint of a run's record: order and completeness, so that a number can be trusted afterwards.

`check_run` reads files only. It finds what a careless writer, a crash or an edit leaves behind:
steps out of order or twice, a missing stop, a config that is not the one recorded, a checkpoint
that is not the one named.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from modern_llm.config import PipelineConfig, config_sha256
from modern_llm.reporting.fields import read_json
from modern_llm.reporting.results import read_run
from modern_llm.reporting.values import Checkpoint, Run, StageRun
from modern_llm.runtime.artifacts import sha256_file, sha256_json

KINDS = ("start", "train", "eval", "save", "sample", "stop")
ONCE = ("train", "eval", "sample")  # kinds with one row a step, also over restarts
START_FIELDS = ("config_sha256", "data_fingerprint", "seed", "time", "versions")
TRAIN_FIELDS = ("lr", "grad_norm", "tokens", "units", "tokens_per_s", "mfu", "memory_gb")


@dataclass(frozen=True)
class Problem:
    """One broken rule: which file, which rule, what was found."""

    where: str
    rule: str
    found: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}: {self.found}"


def check_run(run: Path) -> list[Problem]:
    """All broken rules of a run folder; none for a good one. Stages not run are no fault.

    Raises:
        DataError: ``run`` is no run folder.
    """
    read = read_run(run)
    problems = [
        Problem(fault.split(" ")[0].rstrip(":"), "can be read", fault) for fault in read.faults
    ]
    config = _config(run, problems)
    for stage in read.started:
        problems += _check_order(stage)
        problems += _check_provenance(stage, config)
        problems += _check_totals(stage)
        problems += _check_run_file(run, stage)
        problems += _check_checkpoint(run, stage)
        problems += _check_parent(read, stage)
    problems += _check_eval(read)
    return problems


def _config(run: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """What config.json says, which is a config; ``None`` when it cannot be had."""
    try:
        value: dict[str, Any] = json.loads((run / "config.json").read_text(encoding="utf-8"))
        PipelineConfig.model_validate(value)
        return value
    except FileNotFoundError:
        return None  # named by read_run
    except ValueError as error:
        told = str(error).splitlines()[0]
        problems.append(Problem("config.json", "is a config of this version", told))
        return None


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good and value is not None else None


def _check_order(stage: StageRun) -> Iterator[Problem]:
    where = f"{stage.name}/metrics.jsonl"
    if not stage.metrics:
        yield Problem(where, "holds rows", "it is missing or empty")
        return
    kinds = [str(row.get("kind")) for row in stage.metrics]
    if strange := sorted({kind for kind in kinds if kind not in KINDS}):
        yield Problem(where, "rows are of known kinds", ", ".join(strange))
    if kinds[0] != "start":
        yield Problem(where, "begins with a start row", f"begins with {kinds[0]}")
    for number, (kind, after) in enumerate(pairwise(kinds), 1):
        if kind == "stop" and after != "start":
            yield Problem(where, "a stop is followed by a start", f"row {number + 1} is {after}")
    if stage.status == "finished":
        last = stage.metrics[-1]
        if kinds[-1] != "stop":
            yield Problem(where, "ends with a stop row", f"ends with {kinds[-1]}")
        elif last.get("status") != "finished":
            yield Problem(where, "the last stop is of the finish", f"it says {last.get('status')}")
    for kind in ONCE:
        steps = [row.get("step") for row in stage.rows(kind)]
        whole = [step for step in steps if isinstance(step, int)]
        if len(whole) < len(steps):
            yield Problem(where, "every row has a step", f"a {kind} row has none")
        double = (
            sorted({s for s in whole if whole.count(s) > 1}) if len(set(whole)) < len(whole) else []
        )
        if double:
            yield Problem(where, "no step twice", f"{kind} rows of steps {double[:5]}")
        back = next((b for a, b in pairwise(whole) if b < a), None)
        if back is not None:
            yield Problem(where, "steps rise", f"{kind} step {back} comes after a later one")
    yield from _check_rows(stage, where)


def _check_rows(stage: StageRun, where: str) -> Iterator[Problem]:
    for row in stage.rows("start"):
        name = row.get("resumed_from")
        if name is not None and name != f"step-{row.get('step', -1):08d}":
            told = f"step {row.get('step')}, resumed from {name}"
            yield Problem(where, "a restart begins at its checkpoint's step", told)
    for row in (*stage.rows("train"), *stage.rows("eval")):
        if _number(row, "loss") is None:
            told = f"{row['kind']} step {row.get('step')}"
            yield Problem(where, "the loss is a number", told)
    for row in stage.rows("train"):
        if missing := [name for name in TRAIN_FIELDS if name not in row]:
            told = f"step {row.get('step')} is without {', '.join(missing)}"
            yield Problem(where, "train rows are complete", told)
    tokens = [n for row in stage.rows("train") if (n := _number(row, "tokens")) is not None]
    if any(b < a for a, b in pairwise(tokens)):
        yield Problem(where, "tokens never fall", "the cumulative count goes down")


def _check_provenance(stage: StageRun, config: dict[str, Any] | None) -> Iterator[Problem]:
    where = f"{stage.name}/metrics.jsonl"
    starts = stage.rows("start")
    for row in starts:
        for name in START_FIELDS:
            if row.get(name) in (None, "", {}):
                yield Problem(where, f"start rows have {name}", "one has none")
    if len({row.get("data_fingerprint") for row in starts}) > 1:
        yield Problem(where, "one data set over all restarts", "start rows have several")
    hashes = {str(row["config_sha256"]) for row in starts if row.get("config_sha256")}
    if len(hashes) > 1:
        told = ", ".join(sorted(h[:12] for h in hashes))
        yield Problem(where, "one config over all restarts", told)
    where, made = f"{stage.name}/result.json", stage.provenance
    if config is not None:
        # A Trainer knows its own section only, and may record the hash of that.
        whole, section = config_sha256(config), config[stage.name]["training"]
        for found in sorted(hashes - {whole, sha256_json(section)}):
            rule = "the config recorded is that of config.json"
            yield Problem(f"{stage.name}/metrics.jsonl", rule, f"start rows have {found[:12]}")
        if made.config_sha256 not in ("", whole):
            rule = "the config recorded is that of config.json"
            yield Problem(where, rule, f"it has {made.config_sha256[:12]}")
    if stage.status != "finished":
        return
    missing = [name for name in ("git_commit", "config_sha256") if not getattr(made, name)]
    missing += ["versions"] if not made.versions.get("torch") else []
    missing += ["seed"] if made.seed is None else []
    if missing:
        yield Problem(where, "provenance is complete", f"without {', '.join(missing)}")
    bare = [row.source or "?" for row in stage.data if not row.fingerprint]
    if bare or not stage.data:
        yield Problem(where, "every source has a fingerprint", ", ".join(bare) or "no data rows")


def _check_totals(stage: StageRun) -> Iterator[Problem]:
    if stage.status != "finished" or not stage.rows("stop"):
        return
    where, last = f"{stage.name}/result.json", stage.rows("stop")[-1]
    for name in ("step", "tokens"):
        told = stage.training.steps if name == "step" else stage.training.tokens
        logged = _number(last, name)
        if logged is not None and told != logged:
            rule = f"{name} equals the last stop row"
            yield Problem(where, rule, f"{told} here, {logged:.0f} in metrics.jsonl")
    restarts = stage.provenance.restarts
    starts = len(stage.rows("start"))
    if restarts is not None and restarts > starts - 1:  # one before the first save is not counted
        yield Problem(where, "restarts are in the record", f"{restarts} here, {starts} start rows")


def _check_run_file(run: Path, stage: StageRun) -> Iterator[Problem]:
    """``run.json`` repeats what other files say; versions without it are no fault."""
    where, faults = f"{stage.name}/run.json", list[str]()
    record = read_json(run / stage.name / "run.json", where, faults)
    yield from (Problem(where, "can be read", fault) for fault in faults)
    if record is None or faults:
        return
    for name, kind in (("iterations", "train"), ("evaluations", "eval")):
        told = [{"kind": kind, **row.raw} for row in record.items(name)]
        if told != stage.rows(kind):
            found = f"{len(told)} {name} here, {len(stage.rows(kind))} rows there, or they differ"
            yield Problem(where, "has the rows of metrics.jsonl", found)
    ours = record.fields("summary").fields("checkpoint").text("sha256")
    if stage.checkpoint is not None and ours != stage.checkpoint.sha256:
        yield Problem(where, "is of the checkpoint of result.json", "the hashes differ")


def locate(run: Path, checkpoint: Checkpoint) -> Path | None:
    """Folder of a checkpoint, also when the run folder was moved since."""
    path = Path(checkpoint.path)
    places = [run / path, run.parent / path, path]
    if run.resolve().name in path.parts:
        at = len(path.parts) - 1 - path.parts[::-1].index(run.resolve().name)
        places.insert(0, run.joinpath(*path.parts[at + 1 :]))
    return next((place for place in places if (place / "manifest.json").is_file()), None)


def _check_checkpoint(run: Path, stage: StageRun) -> Iterator[Problem]:
    if stage.status != "finished":
        return
    where = f"{stage.name}/result.json"
    if stage.checkpoint is None:
        yield Problem(where, "names a checkpoint", "it names none")
        return
    folder = locate(run, stage.checkpoint)
    if folder is None:
        rule = "the checkpoint exists"
        yield Problem(where, rule, f"no manifest.json in {stage.checkpoint.path}")
        return
    if sha256_file(folder / "manifest.json") != stage.checkpoint.sha256:
        rule = "the checkpoint's manifest has the recorded hash"
        yield Problem(where, rule, f"{folder / 'manifest.json'} was changed")
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Problem(str(folder), "the manifest lists files", "it cannot be read")
        return
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            yield Problem(str(file), f"has {size} bytes", found)


def _check_parent(run: Run, stage: StageRun) -> Iterator[Problem]:
    before = run.stages.get(stage.parent.stage) if stage.parent else None
    if stage.parent is None or before is None or before.checkpoint is None:
        return
    if before.checkpoint.sha256 != stage.parent.sha256:
        rule = f"starts from this run's {before.name} checkpoint"
        yield Problem(f"{stage.name}/result.json", rule, "the hashes differ")


def _check_eval(run: Run) -> Iterator[Problem]:
    for name in run.evaluation.foreign:
        rule = f"evaluates this run's {name} checkpoint"
        yield Problem("eval/result.json", rule, "the hashes differ")

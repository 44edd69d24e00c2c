"""Checks that ``metrics.jsonl`` is a whole and honest record of a run, restarts included."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("start", "train", "eval", "save", "sample", "stop")
START_FIELDS = (
    "config_sha256",
    "data_fingerprint",
    "git_commit",
    "resumed_from",
    "seed",
    "time",
    "versions",
)
TRAIN_FIELDS = ("loss", "lr", "grad_norm", "tokens", "units", "tokens_per_s", "mfu", "memory_gb")


def check_run_record(path: Path, *, finished: bool = True) -> list[str]:
    """Defects of a run's log, each with its line number; an empty list when there is none.

    Checked: every line is a row of a known kind; the run begins with a start row that says what it
    is computed with; a restart names the checkpoint of its step and has the same data; no train or
    eval step comes twice or out of order; tokens grow and losses are numbers; and, with
    ``finished``, the last row says so.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            known = row["kind"] in KINDS and isinstance(row["step"], int)
        except (ValueError, KeyError, TypeError):
            known = False
        if known:
            rows.append((number, row))
        else:
            problems.append(f"line {number}: not a row of a run")
    if not rows:
        return [*problems, "no rows"]
    problems += _starts(rows)
    problems += _order(rows)
    last = rows[-1][1]
    if finished and (last["kind"], last.get("status")) != ("stop", "finished"):
        problems.append("the last row does not say that the run finished")
    return problems


def _starts(rows: list[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    if rows[0][1]["kind"] != "start" or rows[0][1]["step"] != 0:
        yield f"line {rows[0][0]}: the run does not begin with a start at step 0"
    prints: set[Any] = set()
    for number, row in rows:
        if row["kind"] != "start":
            continue
        missing = [field for field in START_FIELDS if field not in row]
        if missing:
            yield f"line {number}: start without {', '.join(missing)}"
        name = row.get("resumed_from")
        if name is not None and name != f"step-{row['step']:08d}":
            yield f"line {number}: starts at step {row['step']}, but says it resumed {name}"
        prints.add(row.get("data_fingerprint"))
        if len(prints) > 1:
            yield f"line {number}: the data is not what the run began with"


def _order(rows: list[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    last_step = {"train": 0, "eval": -1}
    tokens = 0
    for number, row in rows:
        kind, step = row["kind"], row["step"]
        if kind in last_step:
            if step <= last_step[kind]:
                yield f"line {number}: {kind} step {step} comes after step {last_step[kind]}"
            last_step[kind] = max(step, last_step[kind])
            if not isinstance(row.get("loss"), float):
                yield f"line {number}: the loss is not a number"
        if kind == "train":
            missing = [field for field in TRAIN_FIELDS if field not in row]
            if missing:
                yield f"line {number}: train row without {', '.join(missing)}"
            elif row["tokens"] <= tokens:
                yield f"line {number}: tokens do not grow"
            tokens = row.get("tokens", tokens)

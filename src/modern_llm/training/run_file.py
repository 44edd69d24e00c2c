"""``run.json``: the whole record of a stage in one file, for notebooks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modern_llm.runtime.artifacts import JsonLines, write_json

RUN_FILE = "run.json"
FORMAT = 1


def write_run_file(folder: Path, *, config: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Put config, start, rows and result of a finished stage into ``run.json``.

    The rows are those of ``metrics.jsonl``, which has each step once over all restarts. A file
    that stands is left.

    Args:
        folder: of the stage.
        config: of the whole run.
        summary: what the stage came to.
    """
    rows = JsonLines(folder / "metrics.jsonl").rows()
    of_kind = {
        kind: [_without_kind(row) for row in rows if row["kind"] == kind]
        for kind in ("start", "train", "eval")
    }
    record = {
        "format": FORMAT,
        "config": config,
        "startup": of_kind["start"][-1].get("startup"),
        "iterations": of_kind["train"],
        "evaluations": of_kind["eval"],
        "summary": summary,
    }
    write_json(folder / RUN_FILE, record, on_exists="skip")


def _without_kind(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "kind"}

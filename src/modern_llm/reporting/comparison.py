"""The report of a comparison of experiments, written from its record alone."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modern_llm.errors import DataError
from modern_llm.reporting.plots.comparison import comparison_figures
from modern_llm.reporting.tables import (
    MISSING,
    code,
    duration,
    escape,
    fixed,
    percent,
    short,
    table,
    whole,
)
from modern_llm.runtime.artifacts import (
    Policy,
    published_folder,
    to_json,
    write_bytes,
    write_text,
)
from modern_llm.runtime.names import sibling_names, standing_siblings

RECORD = "comparison.json"
METRICS = {"final_val_loss": "validation loss (nats per token)", "bits_per_byte": "bits per byte"}
HOLD = {
    "tokens": "tokens trained on",
    "params": "parameters",
    "flops": "training FLOPs",
    "seconds": "training seconds",
}
CAPTIONS = {
    "ranking.png": "Difference from the reference, over paired seeds, with its 95 % interval.",
    "curves.png": "Validation loss over the tokens, mean and 95 % band; grey is the reference.",
    "pareto.png": "Quality against cost; the line joins what nothing else beats in both.",
}


def read_comparison(folder: Path) -> dict[str, Any]:
    """The record that `write_comparison` left.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        value: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no comparison: {error}") from None
    return value


def write_comparison(
    folder: Path, record: dict[str, Any], *, on_exists: Policy = "timestamp"
) -> Path | None:
    """Write record, table, plots and report, whole or not at all.

    Args:
        folder: of the comparison; a sibling with the time in its name where another stands.
        record: what `modern_llm.experiments.compare_experiments` found.
        on_exists: policy; a folder with this very record is left as it is.

    Returns:
        The folder, or ``None`` when another stands and was to be left alone.

    Raises:
        ProtectedPathError: the disk refuses.
    """
    text = to_json(record)
    for standing in standing_siblings(folder)[:1]:
        same = (standing / RECORD).is_file() and (standing / RECORD).read_text() == text
        if same and on_exists != "replace":
            return standing
        if on_exists == "skip":
            return None
    pictures = comparison_figures(record)
    target = folder
    if on_exists != "replace":
        target = next(name for name in sibling_names(folder) if not name.exists())
    with published_folder(target, replace=on_exists == "replace") as staging:
        write_text(staging / RECORD, text)
        write_text(staging / "comparison.csv", _as_csv(record["rows"]))
        for name, png in pictures.items():
            write_bytes(staging / name, png)
        write_text(staging / "report.md", report_text(record, list(pictures)))
    return target


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def report_text(record: dict[str, Any], pictures: list[str]) -> str:
    """The whole markdown of a comparison."""
    sections = [
        [f"# {escape(record['title'])}"],
        _opening(record),
        _quality(record, pictures),
        _costs(record, pictures),
        _method(record),
        _failures(record),
    ]
    return "\n\n".join(part for section in sections for part in section) + "\n"


def _opening(record: dict[str, Any]) -> list[str]:
    facts, parts = record["facts"], []
    if facts.get("description"):
        parts.append(escape(facts["description"]))
    words: dict[str, list[str]] = {}
    for row in record["rows"]:
        words.setdefault(row["verdict"], []).append(code(row["experiment"]))
    told = [
        f"**{word}**: {', '.join(names)}" for word, names in words.items() if word != "reference"
    ]
    parts.append(
        f"Against {code(record['reference'])}, in {METRICS[record['metric']]}, at p < "
        f"{record['alpha']:g}: " + "; ".join(told) + "."
    )
    return parts


def _picture(name: str, pictures: list[str]) -> list[str]:
    return [f"![{CAPTIONS[name]}]({name})\n\n{CAPTIONS[name]}"] if name in pictures else []


def with_interval(row: dict[str, Any], name: str, digits: int) -> str:
    """``1.234 [1.230, 1.238]``; without the interval where there is one seed."""
    told = fixed(row[name], digits)
    if row[f"{name}_low"] is None:
        return told
    low, high = (f"{row[f'{name}_{end}']:.{digits}f}" for end in ("low", "high"))
    return f"{told} [{low}, {high}]"


def quality_table(record: dict[str, Any]) -> str:
    """The experiments by quality, the best first, with difference and verdict."""
    rows = []
    for row in sorted(record["rows"], key=lambda row: row[record["metric"]]):
        difference = MISSING
        if row["difference"] is not None:
            difference = f"{row['difference']:+.4f}"
            if row["difference_low"] is not None:
                difference += f" [{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
        rows.append(
            [
                code(row["experiment"]),
                str(row["n"]),
                with_interval(row, record["metric"], 4),
                fixed(row["final_val_perplexity"], 2),
                difference,
                MISSING if row["p"] is None else f"{row['p']:.2g}",
                row["verdict"],
            ]
        )
    heads = ["experiment", "seeds", METRICS[record["metric"]], "perplexity", "difference"]
    return table([*heads, "p", "verdict"], rows, right="lrrrrr")


def _quality(record: dict[str, Any], pictures: list[str]) -> list[str]:
    shown = [part for name in ("ranking.png", "curves.png") for part in _picture(name, pictures)]
    return ["## Quality", quality_table(record), *shown]


def _costs(record: dict[str, Any], pictures: list[str]) -> list[str]:
    rows = [
        [
            code(row["experiment"]),
            fixed(row["params_millions"], 3),
            short(row["flops_per_token"]),
            short(row["train_flops"]),
            short(row["tokens"]),
            duration(row["train_time_s"]),
            whole(row["tokens_per_s"]),
            percent(row["mfu"]),
            whole(row["peak_memory_mb"]),
            whole(row["prefill_tokens_per_s"]),
            whole(row["inference_tokens_per_s"]),
        ]
        for row in record["rows"]
    ]
    heads = ["experiment", "parameters (M)", "FLOPs/token", "training FLOPs", "tokens", "time"]
    heads += ["tokens/s", "MFU", "peak MB", "prefill tokens/s", "decode tokens/s"]
    parts = ["## Cost", table(heads, rows, right="lrrrrrrrrrr")]
    if told := record["facts"].get("speed"):
        parts.append(escape(told))
    return [*parts, *_picture("pareto.png", pictures)]


def _method(record: dict[str, Any]) -> list[str]:
    equal = [HOLD[name] for name, same in record["equal"].items() if same]
    differ = [HOLD[name] for name, same in record["equal"].items() if not same]
    data = record["experiments"][0]["data"]
    trainings = [one for e in record["experiments"] for one in e["seeds"]]
    seeds = sorted({one["seed"] for one in trainings})
    commits = {str(one.get("commit") or "unknown") for one in trainings}
    tests = sorted({row["test"] for row in record["rows"]} - {"none"})
    asked = f" (asked for: {HOLD[record['hold']]})" if record["hold"] else ""
    facts = [
        f"Equal within 1 % for all{asked}: {', '.join(equal) or 'nothing'}. "
        f"Not equal: {', '.join(differ) or 'nothing'}.",
        f"Seeds {', '.join(map(str, seeds))}: a seed decides the first weights and the order of "
        f"the data; {_pairs(record['experiments'])}.",
        f"Test: {', '.join(tests) or 'none, for want of a second seed'}; intervals are 95 %, from "
        "Student's t, each for itself.",
        "Validation is one pass over the whole split after the last step: "
        f"{data['validation_bytes']:,} bytes, sha256 {code(data['validation_sha256'][:12])}.",
        *_of_each(record["experiments"], "Training text", _training_text),
        *_of_each(record["experiments"], "Hardware", _hardware),
        f"Compared with torch {escape(str(record['versions'].get('torch')))}; trained by commit "
        f"{', '.join(map(code, sorted(commits)))} (+: with uncommitted changes).",
    ]
    parts = ["## Method", "\n".join(f"- {fact}" for fact in facts)]
    if command := record["facts"].get("command"):
        parts.append(f"Run it again: {code(command)}")
    return parts


def _pairs(experiments: list[dict[str, Any]]) -> str:
    """Whether runs of one seed saw the same batches' text in the same order."""
    orders = {
        (
            experiment["data"]["train_sha256"],
            experiment["data"]["tokenizer_sha256"],
            experiment["config"]["pretrain"]["training"]["seq_len"],
        )
        for experiment in experiments
    }
    if len(orders) > 1:
        return (
            "runs are compared in pairs by seed, but text, tokenizer or length of rows differ, and "
            "with them what a pair has in common"
        )
    return "the same order for every experiment, so that runs are compared in pairs"


def _of_each(
    experiments: list[dict[str, Any]], what: str, told: Callable[[dict[str, Any]], str]
) -> list[str]:
    """One line when all experiments agree, else one for each group that does."""
    groups: dict[str, list[str]] = {}
    for experiment in experiments:
        groups.setdefault(told(experiment), []).append(code(experiment["name"]))
    if len(groups) == 1:
        return [f"{what}: {text}." for text in groups]
    return [f"{what} of {', '.join(names)}: {text}." for text, names in groups.items()]


def _training_text(experiment: dict[str, Any]) -> str:
    data = experiment["data"]
    return (
        f"{data['train_tokens']:,} tokens a pass, sha256 {code(data['train_sha256'][:12])}; "
        f"tokenizer {code(data['tokenizer_sha256'][:12])}"
    )


def _hardware(experiment: dict[str, Any]) -> str:
    hardware = experiment["hardware"]
    gpus = "".join(f", {escape(gpu)}" for gpu in hardware.get("gpus", ()))
    cpu = escape(str(hardware.get("cpu")))
    return f"{cpu}, {hardware.get('threads')} thread(s) a training{gpus}"


def _failures(record: dict[str, Any]) -> list[str]:
    lost = [
        f"- {code(e['name'])}, seed {seed}: {escape(why, limit=300)}"
        for e in record["experiments"]
        for seed, why in e["failed"].items()
    ]
    left_out = [f"- {escape(line)}" for line in record["facts"].get("left_out", ())]
    return ["## Without a result", "\n".join(lost + left_out)] if lost or left_out else []

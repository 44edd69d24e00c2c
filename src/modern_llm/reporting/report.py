"""The report of a run, built from its files alone, and protected like every result."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from modern_llm.errors import ProtectedPathError
from modern_llm.reporting import section_results as results
from modern_llm.reporting import section_run as about
from modern_llm.reporting.gains import scored_stages, stage_scores
from modern_llm.reporting.plots import figures
from modern_llm.reporting.results import read_run
from modern_llm.reporting.tables import code, escape
from modern_llm.reporting.values import Run
from modern_llm.runtime.artifacts import (
    Policy,
    published_folder,
    to_json,
    write_bytes,
    write_json,
    write_text,
)
from modern_llm.runtime.names import sibling_names, standing_siblings


def report_path(run: Path, report_dir: Path) -> Path:
    """Name that the report of ``run`` has when none stands yet."""
    return report_dir / f"{run.resolve().name}_report.md"


def assets_folder(report: Path) -> Path:
    """Folder of a report's figures: they belong to each other by name."""
    head, _, tail = report.stem.rpartition("_report")
    return report.with_name(f"{head}_assets{tail}")


def newest_report(run: Path, report_dir: Path) -> Path | None:
    """The report of ``run`` that was written last; ``None`` without any."""
    wanted = report_path(run, report_dir)
    return next(iter(standing_siblings(wanted, suffix=wanted.suffix)), None)


def is_current(report: Path, run: Path) -> bool:
    """Whether ``report`` tells the scores that the files of ``run`` hold now."""
    try:
        told = (assets_folder(report) / "scores.json").read_text(encoding="utf-8")
    except OSError:
        return False
    return told == to_json(_scores(read_run(run)))


def write_report(run: Path, report_dir: Path, *, on_exists: Policy = "timestamp") -> Path | None:
    """Write ``<run>_report.md`` and ``<run>_assets/`` (PNG, scores.json), whole or not at all.

    The folder of figures is the claim on the name: it appears in one rename, so two processes at
    once end with two reports, each with its own figures. The same files give the same bytes.

    Args:
        run: run folder; stages may be missing, unfinished or damaged, which the report says.
        report_dir: where reports lie.
        on_exists: ``timestamp`` a sibling pair, ``skip`` nothing, ``replace`` after a backup.

    Returns:
        The report's path, or ``None`` when one exists and was to be left alone.

    Raises:
        DataError: ``run`` is no run folder.
        ProtectedPathError: ``report_dir`` cannot be written.
    """
    wanted = report_path(run, report_dir)
    if on_exists == "skip" and (wanted.exists() or assets_folder(wanted).exists()):
        return None
    read = read_run(run)
    pictures = figures(read)
    scores = _scores(read)
    if on_exists == "replace":
        text = report_text(read, assets_folder(wanted).name, pictures)
        _publish_assets(assets_folder(wanted), pictures, scores, replace=True)
        return write_text(wanted, text, on_exists="replace")
    for path in sibling_names(wanted, suffix=wanted.suffix):
        if not path.exists() and _publish_assets(assets_folder(path), pictures, scores):
            text = report_text(read, assets_folder(path).name, pictures)
            return write_text(path, text, on_exists="timestamp")
        if on_exists == "skip":
            break
    return None


def _scores(run: Run) -> dict[str, Any]:
    return {name: [asdict(s) for s in stage_scores(run, name)] for name in scored_stages(run)}


def _publish_assets(
    folder: Path, pictures: dict[str, bytes], scores: dict[str, Any], *, replace: bool = False
) -> bool:
    """Write figures and scores; ``False`` when another report has the name."""
    if folder.exists() and not replace:
        return False
    try:
        with published_folder(folder, replace=replace) as staging:
            # Never empty: a rename onto an empty folder would not fail, and claim nothing.
            write_json(staging / "scores.json", scores)
            for name, png in pictures.items():
                write_bytes(staging / name, png)
    except ProtectedPathError:
        if folder.exists() and not replace:  # another process was faster
            return False
        raise
    return True


def report_text(run: Run, assets: str, names: dict[str, bytes] | list[str]) -> str:
    """The whole markdown; ``assets`` is the name of the folder of figures beside it."""
    pictures = results.Pictures(assets, names)
    sections = [
        opening(run),
        results.headline(run, pictures),
        results.stages_table(run),
        results.scores_table(run),
        ["## What was run"],
        about.configuration(run),
        about.data(run),
        about.training(run),
        about.generation(run),
        about.machine(run),
        results.curves(run, pictures),
        results.best_of_n_section(run, pictures),
        results.samples(run),
        about.mask_audit(run),
        about.lineage(run),
        about.not_evaluated(run),
        about.reproduce(run),
    ]
    return "\n\n".join(part for section in sections for part in section) + "\n"


def opening(run: Run) -> list[str]:
    """Title, one line on the state of the run, and a warning when files are damaged."""
    done = [s.name for s in run.stages.values() if s.status == "finished"]
    done += ["eval"] if run.evaluation.status == "finished" else []
    open_ = [f"{s.name} ({about.status(s)})" for s in run.stages.values() if s.name not in done]
    open_ += [] if "eval" in done else [f"eval ({run.evaluation.status})"]
    told = f"Finished: {', '.join(done) or 'nothing'}."
    if open_:
        told += f" Not finished: {', '.join(open_)}."
    parts = [f"# Report of run {code(run.name)}", told]
    if run.faults:
        lines = "\n".join(f"> - {escape(fault)}" for fault in run.faults)
        parts.append(f"> **Some files are missing or damaged:**\n>\n{lines}")
    if run.evaluation.foreign:
        names = ", ".join(run.evaluation.foreign)
        parts.append(
            f"> **`eval/result.json` is of other checkpoints of {names} than this run has now:** "
            "their scores are left out. Run `eval` again."
        )
    return parts

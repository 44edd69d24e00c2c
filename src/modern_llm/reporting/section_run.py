"""Sections of the report that say what was run: config, data, machines, lineage, how to repeat."""

from collections.abc import Iterator
from typing import Any

from modern_llm.config import get_pipeline_preset, list_presets
from modern_llm.errors import ModernLLMError
from modern_llm.reporting.tables import (
    MISSING,
    code,
    digest,
    duration,
    escape,
    fence,
    fixed,
    percent,
    short,
    table,
    whole,
)
from modern_llm.reporting.values import Provenance, Run, StageRun

AUDIT_LINES = 24
PLACES = ("name", "description", "paths.", "data.root", "data.cache_dir")  # change no number


def differences(base: Any, own: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, value of ``base`` and value of ``own``, wherever two JSON values differ."""
    if isinstance(base, dict) and isinstance(own, dict):
        for key in sorted(base.keys() | own.keys()):
            below = f"{path}.{key}" if path else str(key)
            yield from differences(base.get(key), own.get(key), below)
    elif base != own:
        yield path, base, own


def configuration(run: Run) -> list[str]:
    """How the config differs from the preset of its name."""
    name = str(run.environment.get("preset") or run.config.get("name") or "")
    parts = ["### Configuration"]
    if isinstance(run.config.get("description"), str) and run.config["description"]:
        parts.append(escape(run.config["description"]))
    summaries = [s.summary for s in run.stages.values() if s.summary]
    if summaries:
        parts.append(f"Model: {escape(summaries[0])}.")
    if not run.config:
        return [*parts, "The config is not readable."]
    if name not in list_presets():
        told = f"No preset is called {code(name)}: the whole config is in the run's `config.json`."
        return [*parts, told]
    try:
        base = get_pipeline_preset(name).model_dump(mode="json")
    except ModernLLMError as error:
        return [*parts, f"The preset {code(name)} cannot be read: {escape(str(error))}"]
    found = [d for d in differences(base, run.config) if not d[0].startswith(PLACES)]
    found = [d for d in found if not d[0].startswith("training.")]  # spread over the stages
    if not found:
        return [*parts, f"Exactly the preset {code(name)}."]
    rows = [[code(path), code(repr(old)), code(repr(new))] for path, old, new in found]
    told = f"The preset {code(name)} with {len(found)} difference(s):"
    return [*parts, told, table(["field", "preset", "this run"], rows)]


def data(run: Run) -> list[str]:
    """Sources of every stage: rows, tokens, what was dropped and why, fingerprints."""
    rows = []
    for stage in run.started:
        for row in stage.data:
            dropped = ", ".join(f"{escape(r)}: {whole(n)}" for r, n in row.dropped.items() if n)
            cells = [stage.name, escape(row.source), escape(row.split), escape(row.kind)]
            numbers = [whole(row.rows), whole(row.tokens), dropped or "none"]
            rows.append([*cells, *numbers, digest(row.fingerprint)])
    if not rows:
        return []
    heads = ["stage", "source", "split", "kind", "rows", "tokens", "dropped", "fingerprint"]
    return ["### Data", table(heads, rows, right="llllrr")]


def training(run: Run) -> list[str]:
    """Time, tokens and speed of every stage."""
    rows = []
    for stage in run.stages.values():
        t = stage.training
        best = MISSING
        if t.best_loss is not None:
            best = f"{fixed(t.best_loss)} at {whole(t.best_step)}"
        rows.append([
            stage.name, status(stage), whole(t.steps), short(t.tokens), duration(t.seconds),
            duration(t.epoch_s), whole(t.tokens_per_s), percent(t.mfu), fixed(t.peak_memory_gb, 2),
            fixed(t.final_loss), best, whole(stage.provenance.restarts),
        ])  # fmt: skip
    heads = ["stage", "status", "steps", "tokens", "time", "time a pass", "tokens/s", "MFU",
             "peak GB", "final loss", "best validation loss, step", "restarts"]  # fmt: skip
    seconds = [s.training.seconds for s in run.stages.values() if s.training.seconds is not None]
    total = f"Training took {duration(sum(seconds))} in all; losses are in nats."
    parts = ["### Training", table(heads, rows, right="llrrrrrrrrrr")]
    return [*parts, total] if seconds else parts


def generation(run: Run) -> list[str]:
    """How fast the models that were timed generate, and their size on disk."""
    rows = []
    for stage in run.started:
        speed = stage.inference
        if speed is None:
            continue
        rows.append([
            stage.name, f"{escape(speed.device)}, {whole(speed.threads)} threads",
            escape(speed.precision), whole(speed.batch_size), whole(speed.prompt_tokens),
            whole(speed.new_tokens), whole(speed.prefill_tokens_per_s),
            whole(speed.decode_tokens_per_s), fixed(milli(speed.first_token_s), 2),
            fixed(milli(speed.token_s), 2), fixed(mega(stage.model_bytes), 1),
        ])  # fmt: skip
    if not rows:
        return []
    heads = ["stage", "device", "precision", "rows", "prompt tokens", "new tokens",
             "prefill tokens/s", "decode tokens/s", "first token ms", "next token ms",
             "model MB"]  # fmt: skip
    told = "Greedy, with a cache; medians after a warm-up, tokens/s of all rows together."
    return ["### Generation", table(heads, rows, right="lllrrrrrrrr"), told]


def milli(value: float | None) -> float | None:
    """Seconds as milliseconds."""
    return None if value is None else 1e3 * value


def mega(value: float | None) -> float | None:
    """Bytes as megabytes of a million."""
    return None if value is None else value / 1e6


def status(stage: StageRun) -> str:
    """Status of a stage, with how far it came when it has not finished."""
    if stage.status != "unfinished":
        return stage.status
    steps = [r["step"] for r in stage.rows("train") if isinstance(r.get("step"), int)]
    stops = [str(r["status"]) for r in stage.rows("stop") if r.get("status")]
    reached = f"unfinished, at step {steps[-1]}" if steps else "unfinished"
    return reached + (f" ({escape(stops[-1])})" if stops else "")


def machine(run: Run) -> list[str]:
    """Hardware, versions, commit, seeds."""
    sources = [s.provenance for s in run.started] + [run.evaluation.provenance]
    hardware = run.environment.get("hardware") or _first(sources, "hardware")
    versions = run.environment.get("versions") or _first(sources, "versions")
    commits = list(dict.fromkeys(p.git_commit for p in sources if p.git_commit))
    dirty = any(p.dirty for p in sources)
    seeds = sorted({p.seed for p in sources if p.seed is not None})
    hashes = list(dict.fromkeys(p.config_sha256 for p in sources if p.config_sha256))
    started = [p.started for p in sources if p.started]
    ended = [p.ended for p in sources if p.ended]
    rows = [
        ["hardware", _pairs(hardware)],
        ["versions", _pairs(versions)],
        ["git commit", ", ".join(map(code, commits)) + (" with local changes" if dirty else "")],
        ["config hash", ", ".join(map(digest, hashes))],
        ["seed", ", ".join(map(str, seeds))],
        ["started, ended", f"{escape(min(started))}, {escape(max(ended))}"
         if started and ended else MISSING],
    ]  # fmt: skip
    told = [[label, value or MISSING] for label, value in rows]
    notes = []
    if len(commits) > 1 or len(hashes) > 1:
        notes = ["**The stages were not all computed with one commit and one config.**"]
    return ["### Hardware and versions", table(["what", "value"], told), *notes]


def _first(sources: list[Provenance], name: str) -> dict[str, Any]:
    return next((found for p in sources if (found := getattr(p, name))), {})


def _pairs(values: Any) -> str:
    if not isinstance(values, dict):
        return ""
    kept = {k: v for k, v in values.items() if v not in (None, [], "")}
    told = ((k, ", ".join(map(str, v)) if isinstance(v, list) else v) for k, v in kept.items())
    return ", ".join(f"{escape(str(k))} {escape(str(v))}" for k, v in told)


def mask_audit(run: Run) -> list[str]:
    """The beginning of each mask audit: what is supervised and what is not."""
    parts = []
    for stage in run.started:
        if not stage.mask_audit.strip():
            continue
        lines = stage.mask_audit.splitlines()
        shown = [line[:400] for line in lines[:AUDIT_LINES]]
        if len(lines) > AUDIT_LINES:
            shown.append(
                f"[... {len(lines) - AUDIT_LINES} more lines in {stage.name}/mask_audit.txt]"
            )
        parts += [f"### {stage.name}", fence("\n".join(shown))]
    return ["## Mask audit", *parts] if parts else []


def lineage(run: Run) -> list[str]:
    """Which checkpoint came from which, with the hashes of their manifests."""
    rows = []
    for stage in run.started:
        here, parent = stage.checkpoint, stage.parent
        before = run.stages.get(parent.stage) if parent else None
        made = before.checkpoint if before else None
        if parent is None:
            matches = "from nothing" if stage.status == "finished" else MISSING
        elif made is None:
            matches = "from outside this run"
        else:
            matches = "yes" if made.sha256 == parent.sha256 else "**NO: another checkpoint**"
        rows.append([
            stage.name,
            code(here.path) if here else MISSING,
            code(here.sha256) if here else MISSING,
            f"{escape(parent.stage)} {digest(parent.sha256)}" if parent else "",
            matches,
        ])  # fmt: skip
    heads = ["stage", "checkpoint", "sha256 of its manifest", "parent", "parent is this run's"]
    return ["## Lineage of checkpoints", table(heads, rows)] if rows else []


def not_evaluated(run: Run) -> list[str]:
    """What is missing and why, faults of the files included."""
    rows = [
        [stage.name, escape(what), escape(why)]
        for stage in run.started
        for what, why in stage.not_evaluated
    ]
    rows += [["eval", escape(what), escape(why)] for what, why in run.evaluation.not_evaluated]
    missing = [(s.name, s.status) for s in run.stages.values() if s.status == "not run"]
    if run.evaluation.status == "not run":
        missing.append(("eval", "not run"))
    rows += [[name, "the whole stage", "was not run"] for name, _ in missing]
    rows += [[escape(f.split("/")[0]) if "/" in f.split(" ")[0] else "", "a file", escape(f)]
             for f in run.faults]  # fmt: skip
    title = "## What could not be evaluated, and why"
    if not rows:
        return [title, "Nothing: all that the config asks for was evaluated."]
    return [title, table(["stage", "what", "why"], rows)]


def reproduce(run: Run) -> list[str]:
    """The commands that repeat the run and rebuild this report."""
    paths = run.config.get("paths")
    output = paths.get("output") if isinstance(paths, dict) else None
    folder = f"{output or 'experiments/runs'}/{run.name}"
    commits = [s.provenance.git_commit for s in run.started if s.provenance.git_commit]
    lines = [f"git checkout {commits[0]}"] if commits else []
    command = run.environment.get("command")
    if isinstance(command, str) and command:
        lines.append(command)
    lines.append("# the resolved config of this run, under a new name")
    config = f"--config {folder}/config.json --run-name {run.name}-again"
    lines.append(f"python scripts/run_pipeline.py --stage all {config}")
    lines += ["# this report, from the files of the run", f"modern-llm report {folder}"]
    return ["## How to reproduce", fence("\n".join(lines), "bash")]

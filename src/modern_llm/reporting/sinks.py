"""The report of the study of attention sinks, from its ``result.json`` alone."""

from collections.abc import Callable
from pathlib import Path

from modern_llm.errors import DataError
from modern_llm.reporting.fields import Fields, read_json
from modern_llm.reporting.plots.sinks import Curve, losses_by_position
from modern_llm.reporting.report import assets_folder, publish, stands
from modern_llm.reporting.tables import (
    MISSING,
    code,
    digest,
    escape,
    fence,
    fixed,
    percent,
    table,
    whole,
)
from modern_llm.runtime.artifacts import Policy
from modern_llm.runtime.names import standing_siblings

FIGURE = "losses.png"
SHOWN = 320  # characters of the start and of the end of a text
MEMORY = (
    "Streaming sinks keep a stream stable; they do not lengthen the memory. What has left the "
    "window is forgotten by every arm with a bounded cache, however long the text goes on: only "
    "the arm that keeps all keys could look back, and its positions were never trained."
)


def write_sinks_report(result: Path, report_dir: Path, *, on_exists: Policy = "timestamp") -> Path:
    """Write ``<name>_report.md`` and ``<name>_assets/``, unless the newest tells this result.

    Args:
        result: ``result.json`` of the study.
        report_dir: where reports lie.
        on_exists: as for every report; to skip leaves the one that stands.

    Returns:
        The report that tells the result, or that was to be left alone.

    Raises:
        DataError: ``result`` cannot be read.
        ProtectedPathError: ``report_dir`` cannot be written.
    """
    faults: list[str] = []
    read = read_json(result, result.name, faults)
    if not read or faults:
        raise DataError(f"{result} is no result of this study: {'; '.join(faults) or 'empty'}")
    wanted = report_dir / f"{read.text('name')}_report.md"
    raw = result.read_bytes()
    for standing in standing_siblings(wanted, suffix=wanted.suffix)[:1]:
        told = assets_folder(standing) / "result.json"
        if on_exists != "replace" and told.is_file() and told.read_bytes() == raw:
            return standing
    if on_exists == "skip" and stands(wanted):
        return wanted
    figure = losses_by_position(
        _curves(read), reference=_label_of(read, read.text("reference")),
        evicted_from=(read.number("window") or 0) / (read.number("context") or 1),
    )  # fmt: skip
    files = {"result.json": raw} | ({FIGURE: figure} if figure else {})
    written = publish(wanted, files, lambda assets: report_text(read, assets), on_exists=on_exists)
    return written or wanted


def report_text(read: Fields, assets: str) -> str:
    """The whole markdown; ``assets`` is the name of the folder of figures beside it."""
    parts = [
        f"# Attention sinks: {code(read.text('name'))}",
        _opening(read),
        f"![Loss by position, and its excess over the reference]({assets}/{FIGURE})",
        _arms_table(read),
        _notes(read),
        "## What it shows",
        "\n".join(f"- {line}" for line in findings(read)),
        "## Differences in the last context",
        _differences(read),
        "## A text written by each",
        *_samples(read),
        "## Models",
        _models(read),
        _provenance(read),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(read: Fields) -> str:
    texts = read.fields("texts")
    length = f"{whole(read.number('contexts'))} contexts of {whole(read.number('context'))} tokens"
    return (
        f"{whole(texts.number('n'))} held-out texts of {length} ({escape(texts.text('source'))}), "
        "each read from its first token to its last through the cache of the arm, token by token "
        "where the cache is full. Losses are in nats per token; intervals are 95 %, "
        f"{escape(read.text('interval'))}."
    )


def _curves(read: Fields) -> list[Curve]:
    return [
        Curve(_two_lines(arm.text("label")), _points(arm, "bins"), _points(arm, "against"))
        for arm in read.items("arms")
    ]


def _points(arm: Fields, key: str) -> tuple[tuple[float, float, float, float], ...]:
    points = []
    for row in arm.items(key):
        begin, end, value = row.number("from"), row.number("to"), row.number("value")
        if begin is not None and end is not None and value is not None:
            points.append(((begin + end) / 2, value, *(row.interval("ci95") or (value, value))))
    return tuple(points)


def _two_lines(label: str) -> str:
    return label.removeprefix("trained with ").replace("; ", "\n")


def _label_of(read: Fields, name: str) -> str:
    labels = {arm.text("name"): arm.text("label") for arm in read.items("arms")}
    return _two_lines(labels.get(name, name))


def _arms_table(read: Fields) -> str:
    heads = (
        "arm", "trained with; cache", "loss in context 1", "context 2",
        f"context {whole(read.number('contexts'))}", "breaks at", "keys and values, KB",
        "ms a token, first context", "last context",
    )  # fmt: skip
    rows = []
    for arm in read.items("arms"):
        contexts = list(arm.items("contexts"))
        cells = [_written(row) for row in (*contexts[:2], *contexts[-1:])]
        seconds = arm.fields("seconds_per_token")
        speed = [_scaled(seconds.number(key), 1e3) for key in ("first", "last")]
        held = _scaled(arm.number("cache_bytes"), 1e-3, 0)
        place = [code(arm.text("name")), escape(arm.text("label").removeprefix("trained with "))]
        rows.append([*place, *cells, _place(arm.number("breaks_at")), held, *speed])
    return table(heads, rows, right="llrrrrrrr")


def _place(breaks_at: float | None) -> str:
    return "nowhere" if breaks_at is None else f"{breaks_at:.2f} contexts"


def _scaled(value: float | None, factor: float, digits: int = 2) -> str:
    return fixed(None if value is None else value * factor, digits)


def _written(row: Fields) -> str:
    interval = row.interval("ci95")
    ends = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{fixed(row.number('value'))}{ends}"


def _notes(read: Fields) -> str:
    window = whole(read.number("window"))
    return (
        "An arm breaks at the first stretch of an eighth of a context where its loss lies, with "
        "its whole interval, more than 0.1 nats above that of the same texts at the end of the "
        f"first {window} tokens, before any cache has dropped a key. All bounded caches hold "
        f"{window} keys, sinks among them. Keys and values are those of one text at its end; "
        "times are medians of one text at a time, on a CPU of one thread at work. "
        f"{MEMORY}"
    )


def findings(read: Fields) -> list[str]:
    """What the numbers say, a sentence or two for each arm that is there."""
    arms = {arm.text("name"): arm for arm in read.items("arms")}
    told: dict[str, Callable[[Fields], str]] = {
        "full/all": _told_all, "full/recent": lambda arm: _told_recent(arm, read),
        "full/sinks": _told_sinks, "window/recent": _told_window,
        "window-learned/recent": _told_learned,
    }  # fmt: skip
    return [f"{code(name)}: {tell(arms[name])}" for name, tell in told.items() if name in arms]


def _course(arm: Fields) -> str:
    contexts = list(arm.items("contexts"))
    if not contexts:
        return "no losses"
    first, last = contexts[0].number("value"), contexts[-1].number("value")
    breaks = arm.number("breaks_at")
    where = "it does not break" if breaks is None else f"it breaks at {_place(breaks)}"
    return f"from {fixed(first)} in the first context to {fixed(last)} in the last; {where}"


def _told_all(arm: Fields) -> str:
    return (
        f"{_course(arm)}. Positions beyond the context were never trained, and the cache grows "
        "with the text."
    )


def _told_recent(arm: Fields, read: Fields) -> str:
    """Whether dropping the first tokens hurts, and whether the model rests attention on them."""
    attention = arm.fields("attention")
    n_sinks = whole(read.number("n_sinks"))
    share = (
        f"its first {n_sinks} tokens get {percent(attention.number('first'))} of the attention "
        f"({percent(attention.number('first_max'))} in the head with most), where an even spread "
        f"gives {percent(attention.number('even'))}"
    )
    rows = [
        row for row in read.items("differences")
        if (row.text("arm"), row.text("minus")) == ("full/recent", "full/sinks")
    ]  # fmt: skip
    interval = rows[0].interval("ci95") if rows else None
    if interval is None:
        return f"{_course(arm)}; {share}."
    if interval[0] > 0:
        cost = f"without them the last context costs {_written(rows[0])} nats a token more"
        return f"{_course(arm)}. The model rests attention on its first tokens: {share}; {cost}."
    return (
        f"{_course(arm)}. This model has formed no sink that it misses: {share}, and keeping them "
        f"changes the last context by {_written(rows[0])} nats a token. Sinks form with enough "
        "training on enough text (arXiv:2410.10781); large models break here (arXiv:2309.17453)."
    )


def _told_sinks(arm: Fields) -> str:
    return f"{_course(arm)}. Positions are indices into the cache and stay below the context."


def _told_window(arm: Fields) -> str:
    return f"{_course(arm)}. It was trained to see so many keys, so that it misses none."


def _told_learned(arm: Fields) -> str:
    share = percent(arm.fields("attention").number("learned"))
    return f"{_course(arm)}. Its learned sinks take {share} of the attention, without any key."


def _differences(read: Fields) -> str:
    rows = []
    for row in read.items("differences"):
        interval = row.interval("ci95")
        verdict = "no interval"
        if not row.flag("same_model") and (read.number("n_seeds") or 1) < 2:
            verdict = "two models of one seed: no verdict"
        elif interval is not None:
            low, high = interval
            verdict = "worse" if low > 0 else "better" if high < 0 else "not distinguishable"
        rows.append([code(row.text("arm")), code(row.text("minus")), _written(row), verdict])
    if not rows:
        return "No two arms that the study compares are there."
    return table(("arm", "minus", "nats per token, paired", "the first is"), rows, right="llr")


def _samples(read: Fields) -> list[str]:
    """Start and end of the text that each arm wrote, as literal text."""
    parts = []
    for arm in read.items("arms"):
        sample = arm.fields("sample")
        prompt, text = sample.text("prompt"), sample.text("text")
        start, end = (prompt + text)[:SHOWN], text[-SHOWN:]
        parts += [
            f"{code(arm.text('name'))}: {whole(sample.number('tokens'))} tokens at temperature "
            f"{sample.number('temperature') or 0:g} after {whole(sample.number('prompt_tokens'))} "
            "of the first text; the start and the end.",
            fence(start if len(text) <= 2 * SHOWN else f"{start}\n[...]\n{end}"),
        ]
    return parts


def _models(read: Fields) -> str:
    rows = [
        [
            escape(model.text("kind")), whole(model.number("seed")), escape(model.text("summary")),
            whole(model.number("params")), whole(model.number("step")),
            digest(model.text("sha256")) if model.text("sha256") else MISSING,
        ]
        for model in read.items("models")
    ]  # fmt: skip
    heads = ("trained as", "seed", "shape", "parameters", "steps", "checkpoint")
    return table(heads, rows, right="lrlrrl")


def _provenance(read: Fields) -> str:
    """What it was computed with."""
    of = read.fields("provenance")
    hardware = of.fields("hardware")
    changed = " and uncommitted changes" if of.flag("dirty") else ""
    return (
        f"Computed by {code(read.text('command'))} at commit "
        f"{digest(of.text('git_commit')) if of.text('git_commit') else MISSING}{changed}, with "
        f"torch {escape(of.fields('versions').text('torch'))} on {escape(hardware.text('cpu'))}, "
        f"{whole(hardware.number('threads'))} threads."
    )

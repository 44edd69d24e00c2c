"""Report and figures of a comparison, from its record alone."""

import io
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modern_llm.errors import DataError
from modern_llm.experiments.compare import comparison_record
from modern_llm.reporting.comparison import (
    quality_table,
    read_comparison,
    report_text,
    write_comparison,
)
from modern_llm.reporting.plots.comparison import comparison_figures, front

BASE = {0: 3.00, 1: 3.10, 2: 3.25}
ARMS = {
    "better-arm": {seed: value - 0.2 + 0.001 * seed for seed, value in BASE.items()},
    "worse-arm": {seed: value + 0.2 + 0.001 * seed for seed, value in BASE.items()},
    "equal-arm": {0: 3.05, 1: 3.02, 2: 3.30},
    "single-arm": {1: 2.95},
}
HOSTILE = "<script>alert(1)</script> | [link](http://evil) `code` *bold*\nnext line"


@pytest.fixture
def make_record(make_result: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Record of a reference and the arms named: ``make_record("better-arm", title="x")``."""

    def make(
        *arms: str, changes: dict[str, dict[str, Any]] | None = None, **options: Any
    ) -> dict[str, Any]:
        changes = changes or {}
        results = [make_result("base", BASE, **changes.get("base", {}))]
        results += [make_result(arm, ARMS[arm], **changes.get(arm, {})) for arm in arms]
        own = {"reference": None, "metric": "final_val_loss", "title": "a study"}
        return comparison_record(results, **{**own, **options})

    return make


Record = Callable[..., dict[str, Any]]


def test_every_verdict_is_in_the_opening_and_in_the_table(make_record: Record) -> None:
    record = make_record(*ARMS)

    opening, table = report_text(record, []).split("## Quality")

    assert (
        "Against `base`, in validation loss (nats per token), at p < 0.01: **better**: "
        "`better-arm`; **worse**: `worse-arm`; **not distinguishable**: `equal-arm`; "
        "**one seed: no verdict**: `single-arm`."
    ) in opening
    lines = [line for line in table.splitlines() if line.startswith("| `")][:5]
    told = {line.split("`")[1]: line.split("|")[-2].strip() for line in lines}
    assert told == {
        "base": "reference", "better-arm": "better", "worse-arm": "worse",
        "equal-arm": "not distinguishable", "single-arm": "one seed: no verdict",
    }  # fmt: skip
    names = [line.split("`")[1] for line in lines]
    assert names == ["better-arm", "single-arm", "base", "equal-arm", "worse-arm"], "best first"


def test_one_seed_has_no_interval_in_the_report(
    make_record: Record, make_result: Callable[..., Any]
) -> None:
    record = comparison_record(
        [make_result("base", {0: 3.0}), make_result("wide", {0: 2.5})],
        reference=None, metric="final_val_loss", title="one",
    )  # fmt: skip

    text = report_text(record, [])

    line = next(line for line in text.splitlines() if line.startswith("| `wide`"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["`wide`", "1", "2.5000", "12.18", "-0.5000", "n/a", "one seed: no verdict"]
    assert "Test: none, for want of a second seed" in text
    assert all(png.startswith(b"\x89PNG") for png in comparison_figures(record).values())


def test_signs_and_intervals_of_differences(make_record: Record) -> None:
    lines = quality_table(make_record("better-arm", "worse-arm")).splitlines()

    better, base, worse = (line.split("|") for line in lines[2:])
    assert better[5].strip().startswith("-0.1990 [-0.20") and better[5].strip().endswith("]")
    assert base[5].strip() == "n/a" and base[6].strip() == "n/a"
    assert worse[5].strip().startswith("+0.2010 [+0.19")


def test_what_is_held_equal_and_what_was_asked_for(make_record: Record) -> None:
    changes = {"better-arm": {"params": 18_000, "train_time_s": 9.0}}

    text = report_text(make_record("better-arm", changes=changes, hold="flops"), [])

    assert (
        "- Equal within 1 % for all (asked for: training FLOPs): tokens trained on, training "
        "FLOPs. Not equal: parameters, training seconds."
    ) in text
    assert "Seeds 0, 1, 2: " in text
    assert "Test: paired t-test over seeds, two-sided;" in text
    several = report_text(make_record("better-arm", "worse-arm"), [])
    assert "Test: paired t-test over seeds, two-sided, Holm's correction;" in several
    assert "asked for" not in several


def test_failures_and_arms_left_out(make_record: Record) -> None:
    failed = {"7": "exit code 5: error: loss=nan"}
    record = make_record(
        "better-arm", changes={"better-arm": {"failed": failed}},
        facts={"left_out": ["n_heads5: d_model=64 is not a multiple of n_heads=5"]},
    )  # fmt: skip

    text = report_text(record, [])

    section = text.split("## Without a result")[1]
    assert "- `better-arm`, seed 7: exit code 5: error: loss=nan" in section
    assert "- n_heads5: d_model=64 is not a multiple of n_heads=5" in section
    assert "## Without a result" not in report_text(make_record("better-arm"), [])


def test_foreign_text_is_no_markup(make_record: Record) -> None:
    facts = {"description": HOSTILE, "left_out": [HOSTILE], "speed": HOSTILE}
    facts["command"] = "modern-llm experiment 'a`b'"
    changes = {"better-arm": {"failed": {"7": HOSTILE}}, "base": {"hardware": {"cpu": HOSTILE}}}

    text = report_text(make_record("better-arm", changes=changes, title=HOSTILE, facts=facts), [])

    assert text.count("alert(1)") == 6
    for markup in ("<script>", "[link]", "http://", "*bold*", "`code`"):
        assert markup not in text
    assert "Run it again: `modern-llm experiment 'a b'`" in text
    assert text.splitlines()[0].startswith("# ") and "next line" in text.splitlines()[0]


def test_texts_and_machines_that_differ_are_told_for_each(make_record: Record) -> None:
    """Bits per byte compare across tokenizers: then there is no one order of the data."""
    other = {"tokenizer_sha256": "d" * 64, "train_tokens": 777, "hardware": {"cpu": "another"}}

    one = report_text(make_record("better-arm"), [])
    two = report_text(
        make_record("better-arm", changes={"better-arm": other}, metric="bits_per_byte"), []
    )

    assert "- Training text: 5,000 tokens a pass" in one
    assert "the same order for every experiment" in one
    assert "- Training text of `base`: 5,000 tokens a pass" in two
    assert f"- Training text of `better-arm`: 777 tokens a pass, sha256 `{'a' * 12}`" in two
    assert f"tokenizer `{'d' * 12}`" in two
    assert "- Hardware of `better-arm`: another" in two
    assert "the same order for every experiment" not in two
    assert "in bits per byte, at p < 0.01" in two


def test_figures_are_pngs_whose_bytes_are_the_same_twice(make_record: Record) -> None:
    record = make_record(*ARMS)

    figures = comparison_figures(record)

    assert list(figures) == ["ranking.png", "curves.png", "pareto.png"]
    for name, png in figures.items():
        image = Image.open(io.BytesIO(png))
        assert image.format == "PNG" and image.width >= 600 and image.height >= 300, name
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 8, f"{name} is blank"
    assert comparison_figures(record) == figures


def test_figures_show_the_numbers(make_record: Record) -> None:
    """A picture that does not change with its data would show nothing."""
    before = comparison_figures(make_record("better-arm", "equal-arm"))
    after = comparison_figures(make_record("worse-arm", "equal-arm"))

    assert all(before[name] != after[name] for name in before)


def test_the_pareto_front_is_that_of_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(rng.randrange(1, 12))]
        wanted = {
            point
            for point in points
            if not any(
                other != point and other[0] <= point[0] and other[1] <= point[1] for other in points
            )
        }

        kept = front(points)

        assert {points[i] for i in kept} == wanted and len(kept) == len(wanted)
        assert all(points.index(points[i]) == i for i in kept), "of equal points the first"
        ordered = [points[i] for i in kept]
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(ordered))
    assert front([]) == []


def test_read_back_and_damaged(make_record: Record, tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "comparison", make_record("better-arm"))
    assert folder is not None
    assert read_comparison(folder)["title"] == "a study"
    assert (folder / "report.md").read_text().count("![") == 3

    (folder / "comparison.json").write_text("{")
    with pytest.raises(DataError, match="no comparison"):
        read_comparison(folder)
    with pytest.raises(DataError, match="no comparison"):
        read_comparison(tmp_path / "nothing")

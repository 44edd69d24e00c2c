"""The report of the study of attention sinks, from a result file that no study wrote."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modern_llm.errors import DataError
from modern_llm.reporting.plots.sinks import Curve, losses_by_position
from modern_llm.reporting.sinks import write_sinks_report

LABELS = {
    "full/all": "trained with full attention; cache: all keys",
    "full/recent": "trained with full attention; cache: last 8",
    "full/sinks": "trained with full attention; cache: first 2 + last 6",
}


def rows(values: list[float], **places: Any) -> list[dict[str, Any]]:
    return [
        {"value": v, "ci95": [v - 0.01, v + 0.01], **{k: f(i) for k, f in places.items()}}
        for i, v in enumerate(values)
    ]


def result_of(missed: bool) -> dict[str, Any]:
    """Three arms over two contexts of two bins; ``missed``: without its first tokens it is lost."""
    lost = 3.0 if missed else 0.0
    losses = {"full/all": [2, 2, 3, 4], "full/recent": [2, 2 + lost] * 2, "full/sinks": [2.0] * 4}
    spread = {"from": lambda i: i / 2, "to": lambda i: (i + 1) / 2}
    arms = [
        {
            "name": name, "label": LABELS[name], "bins": rows(y, **spread),
            "against": rows([v - 2 for v in y], **spread),
            "contexts": rows([(y[0] + y[1]) / 2, (y[2] + y[3]) / 2]),
            "breaks_at": 0.5 if y[1] > 2 else 1.0 if y[2] > 2.5 else None,
            "cache_bytes": 4096, "seconds_per_token": {"first": 0.001, "last": 0.0025},
            "attention": {"first": 0.6 if missed else 0.02, "first_max": 0.9, "even": 0.15},
            "sample": {"prompt": "To be", "text": "| `or` not\n" * 90, "tokens": 16,
                       "temperature": 0.8},
        }
        for name, y in losses.items()
    ]  # fmt: skip
    other = {"arm": "window/recent", "minus": "full/sinks", "same_model": False, "value": 1.0,
             "ci95": [0.9, 1.1]}  # fmt: skip
    difference = {"arm": "full/recent", "same_model": True, "minus": "full/sinks",
                  "value": lost / 2, "ci95": [lost / 2 - 0.01, lost / 2 + 0.01]}  # fmt: skip
    return {
        "format": 1, "name": "mine", "context": 16, "contexts": 2, "window": 8, "n_sinks": 2,
        "texts": {"source": "made up", "n": 5, "tokens": 32}, "reference": "full/sinks",
        "interval": "bootstrap over 5 texts", "arms": arms, "differences": [difference, other],
        "n_seeds": 1,
        "models": [{"kind": "full", "seed": 0, "summary": "1L", "params": 1234, "step": 5,
                    "sha256": "ab" * 32}],
    }  # fmt: skip


def written(folder: Path, result: dict[str, Any]) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    return path


@pytest.mark.parametrize("missed", [True, False])
def test_the_report_says_what_the_numbers_say(tmp_path: Path, missed: bool) -> None:
    report = write_sinks_report(written(tmp_path, result_of(missed)), tmp_path / "report")
    text = report.read_text()
    assert report.name == "mine_report.md"
    assert ("The model rests attention on its first tokens" in text) == missed
    assert ("has formed no sink that it misses" in text) == (not missed)
    assert ("| worse" in text) == missed
    assert ("| not distinguishable" in text) == (not missed)
    row = next(line for line in text.splitlines() if line.startswith("| `window/recent`"))
    assert "two models of one seed: no verdict" in row, "texts say nothing of other seeds"
    assert "60.0 % of the attention" in text if missed else "2.0 % of the attention" in text
    assert "What has left the window is forgotten" in text
    assert (
        "`full/all`: from 2.000 in the first context to 3.500 in the last; it breaks at 1.00"
        in text
    )
    row = next(line for line in text.splitlines() if line.startswith("| `full/sinks`"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:10] == [
        "2.000 [1.990, 2.010]", "2.000 [1.990, 2.010]", "2.000 [1.990, 2.010]", "nowhere", "4",
        "1.00", "2.50",
    ]  # fmt: skip
    assert "To be| `or` not" in text, "prompt and text, as they are"
    assert "[...]" in text and "5 held-out texts of 2 contexts of 16 tokens (made up)" in text
    image = Image.open(tmp_path / "report" / "mine_assets" / "losses.png")
    assert image.width >= 800 and len(image.convert("RGB").getcolors(1 << 20) or []) > 8


def test_the_same_result_is_told_once_and_another_beside_it(tmp_path: Path) -> None:
    result = written(tmp_path, result_of(True))
    first = write_sinks_report(result, tmp_path / "report")
    before = first.stat().st_mtime_ns
    assert write_sinks_report(result, tmp_path / "report") == first
    assert first.stat().st_mtime_ns == before
    written(tmp_path, result_of(False))
    assert write_sinks_report(result, tmp_path / "report", on_exists="skip") == first
    assert first.stat().st_mtime_ns == before
    second = write_sinks_report(result, tmp_path / "report")
    assert (
        second != first and "no sink" in second.read_text() and "no sink" not in first.read_text()
    )
    third = write_sinks_report(result, tmp_path / "report", on_exists="replace")
    assert third == first and "no sink" in first.read_text()
    assert len(list((tmp_path / "report").glob("*.bak-*"))) == 2, "report and figures are kept"


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_result_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(DataError, match="is no result of this study"):
        write_sinks_report(path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_figure_is_the_same_for_the_same_numbers() -> None:
    points = tuple((i / 2, 2.0, 1.9, 2.1) for i in range(8))
    high = tuple((i / 2, 2.0 + i, 1.9 + i, 2.1 + i) for i in range(8))
    curves = [Curve("one\nline", points, points), Curve("two\nlines", high, high)]
    figures = [
        losses_by_position(curves, reference="one\nline", evicted_from=0.5) for _ in range(2)
    ]
    assert figures[0] is not None and figures[0] == figures[1]
    other = losses_by_position(curves[:1], reference="one\nline", evicted_from=0.5)
    assert other != figures[0] and Image.open(io.BytesIO(figures[0])).format == "PNG"
    assert losses_by_position([Curve("x", (), ())], reference="x", evicted_from=0.5) is None

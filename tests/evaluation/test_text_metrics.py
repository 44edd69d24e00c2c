import sys
from pathlib import Path
from typing import Any

import pytest

from modern_llm.evaluation.scores import NotEvaluated, Score
from modern_llm.evaluation.text_metrics import text_metric

SCRIPT = """
import datasets
import evaluate


class SameLength(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(
            description="share of equal lengths", citation="", inputs_description="",
            features=features,
        )

    def _compute(self, predictions, references):
        same = [float(len(p) == len(r)) for p, r in zip(predictions, references)]
        return {"share": sum(same) / len(same), "each": same, "names": ["a"], "text": "b"}
"""


@pytest.mark.usefixtures("metric_cache")
def test_a_local_metric(tmp_path: Path) -> None:
    folder = tmp_path / "same_length"
    folder.mkdir()
    (folder / "same_length.py").write_text(SCRIPT)
    results = text_metric(str(folder), ["ab", "c", "d"], ["xy", "z", "long"], key="t")
    share, each = results
    assert isinstance(share, Score) and isinstance(each, Score)
    assert share.metric == "share"
    assert share.value == each.value == pytest.approx(2 / 3)
    assert share.ci95 is None
    assert each.ci95 is not None and each.ci95[0] < 2 / 3 < each.ci95[1]
    assert each.n == 3
    assert share.key == f"t/{folder}"


def test_neither_hub_nor_local_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = pytest.importorskip("evaluate")
    for error in (FileNotFoundError("Couldn't find it\nmore"), ConnectionError()):

        def load(name: str, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(evaluate, "load", load)
        (missing,) = text_metric("rouge", ["a"], ["a"], key="t")
        assert isinstance(missing, NotEvaluated)
        assert missing.what == "t/rouge"
        assert "neither the hub nor a local copy" in missing.why
        assert "\n" not in missing.why


def test_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = pytest.importorskip("evaluate")

    def load(name: str) -> Any:
        raise ImportError("No module named 'rouge_score'")

    monkeypatch.setattr(evaluate, "load", load)
    (missing,) = text_metric("rouge", ["a"], ["a"], key="t")
    assert isinstance(missing, NotEvaluated)
    assert "rouge_score" in missing.why


def test_no_evaluate_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)
    (missing,) = text_metric("rouge", ["a"], ["a"], key="t")
    assert isinstance(missing, NotEvaluated)
    assert "'evaluate' cannot be imported" in missing.why


@pytest.mark.parametrize("where", ["load", "compute"])
def test_a_metric_that_raises_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Broken:
        def compute(self, **kwargs: Any) -> Any:
            raise ZeroDivisionError("float division\nmore")

    def load(name: str) -> Any:
        return Broken().compute() if where == "load" else Broken()

    monkeypatch.setattr(pytest.importorskip("evaluate"), "load", load)
    (missing,) = text_metric("bleu", ["a"], ["a"], key="t")
    why = "the metric's own code failed: ZeroDivisionError float division"
    assert missing == NotEvaluated("t/bleu", why)


def test_nothing_to_score(monkeypatch: pytest.MonkeyPatch) -> None:
    (missing,) = text_metric("rouge", [], [], key="t")
    assert isinstance(missing, NotEvaluated)
    with pytest.raises(ValueError, match="1 predictions for 2"):
        text_metric("rouge", ["a"], ["a", "b"], key="t")
    evaluate = pytest.importorskip("evaluate")

    class Silent:
        def compute(self, **kwargs: Any) -> None:
            return None

    monkeypatch.setattr(evaluate, "load", lambda name: Silent())
    (empty,) = text_metric("rouge", ["a"], ["a"], key="t")
    assert empty == NotEvaluated("t/rouge", "the metric returned no number")

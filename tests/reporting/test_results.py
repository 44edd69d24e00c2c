import math
from pathlib import Path

import pytest
from fake_run import dump, load

from modern_llm.errors import DataError
from modern_llm.reporting.results import read_run


def test_a_good_run_reads_without_faults(fake: Path) -> None:
    run = read_run(fake)

    assert run.faults == ()
    assert [s.status for s in run.stages.values()] == ["finished"] * 4
    dpo = run.stages["dpo"]
    assert (dpo.training.steps, dpo.training.tokens, dpo.unit) == (120, 120 * 4096, "pair")
    assert dpo.data[0].dropped == {"equal answers": 7, "too long": 2}
    assert dpo.parent is not None and dpo.parent.stage == "sft"
    assert run.stages["sft"].unit == "token"
    assert run.evaluation.reasoning is not None
    assert run.evaluation.reasoning.curves["oracle"][-1].value == 0.92
    assert len(run.evaluation.reasoning.bins) == 9  # the empty one has no mean
    bin_ = run.evaluation.reasoning.bins[3]
    assert bin_.ci95 == pytest.approx((bin_.accuracy - 0.09, bin_.accuracy + 0.07))


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        read_run(tmp_path / "none")
    with pytest.raises(DataError, match="neither config"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"format": 1', "[" * 100_000])
def test_a_damaged_result_is_named_and_the_rest_is_read(fake: Path, text: str) -> None:
    (fake / "sft" / "result.json").write_text(text)

    run = read_run(fake)

    assert run.stages["sft"].status == "damaged"
    assert any("sft/result.json" in fault for fault in run.faults)
    assert len(run.stages["sft"].rows("train")) == 100
    assert run.stages["dpo"].status == "finished"


def test_bytes_that_are_no_text_are_named(fake: Path) -> None:
    (fake / "eval" / "result.json").write_bytes(b"\xff\xfe\x00")
    (fake / "environment.json").write_bytes(b"\xff")

    run = read_run(fake)

    assert run.evaluation.status == "damaged"
    assert len(run.faults) == 2


def test_an_unfinished_stage(fake: Path) -> None:
    (fake / "dpo" / "result.json").unlink()

    run = read_run(fake)

    assert run.stages["dpo"].status == "unfinished"
    assert any("the dpo stage has not finished" in fault for fault in run.faults)


def test_torn_and_foreign_metric_rows_are_counted(fake: Path) -> None:
    path = fake / "sft" / "metrics.jsonl"
    before = len(path.read_text().splitlines())
    path.write_text(path.read_text() + '[1]\n{"kind": "tra')

    run = read_run(fake)

    assert len(run.stages["sft"].metrics) == before
    assert f"2 damaged row(s) passed over (line {before + 1}, {before + 2})" in run.faults[0]


def test_wrong_types_are_named_with_their_path(fake: Path) -> None:
    path = fake / "pretrain" / "result.json"
    value = load(path)
    value["training"]["tokens"] = "many"
    value["training"]["steps"] = 1.5
    value["model"]["params"] = True
    value["data"][0]["rows"] = None
    value["scores"] = [{"metric": "x", "value": 1.0, "ci95": [1]}, "no score"]
    value["parent"] = [1]
    dump(path, value)

    run = read_run(fake)

    faults = "\n".join(run.faults)
    assert 'pretrain/result.json: training.tokens is "many", expected a number' in faults
    assert "training.steps is 1.5, expected a whole number" in faults
    assert "model.params is true, expected a number" in faults
    assert "scores[0].ci95 is [1], expected [low, high]" in faults
    assert 'scores[1] is "no score", expected an object' in faults
    assert run.stages["pretrain"].training.tokens is None
    assert run.stages["pretrain"].data[0].rows is None


def test_numbers_that_are_not_finite_count_as_missing(fake: Path) -> None:
    path = fake / "pretrain" / "result.json"
    path.write_text(path.read_text().replace("20800.0", "NaN"))

    assert read_run(fake).stages["pretrain"].training.tokens_per_s is None
    assert not math.isnan(read_run(fake).stages["sft"].training.tokens_per_s or 0)


def test_another_format_is_named(fake: Path) -> None:
    path = fake / "eval" / "result.json"
    dump(path, load(path) | {"format": 2})

    assert "eval/result.json is of format 2; this version reads 1" in read_run(fake).faults


def test_curves_of_another_length_are_left_out_and_named(fake: Path) -> None:
    path = fake / "eval" / "result.json"
    value = load(path)
    value["reasoning"]["curves"]["majority"].pop()
    dump(path, value)

    run = read_run(fake)

    assert run.evaluation.reasoning is not None
    assert "majority" not in run.evaluation.reasoning.curves
    assert any("majority does not have one point for each n" in f for f in run.faults)

"""Comparisons of results: what compares, the table, what is equal, and all that is written."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.errors import ConfigError
from modern_llm.experiments import ExperimentResult, compare_experiments
from modern_llm.experiments.compare import METRICS, comparison_record

Make = Callable[..., ExperimentResult]
BASE = {0: 3.00, 1: 3.10, 2: 3.25}
BETTER = {0: 2.80, 1: 2.901, 2: 3.049}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_row_an_experiment_with_mean_interval_and_n(make_result: Make) -> None:
    frame = compare_experiments([make_result("base", BASE), make_result("wide", BETTER)])

    assert list(frame["experiment"]) == ["base", "wide"] and list(frame["n"]) == [3, 3]
    for metric in METRICS:
        assert {metric, f"{metric}_low", f"{metric}_high"} <= set(frame.columns)
    base = frame.iloc[0]
    mean = sum(BASE.values()) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in BASE.values()) / 2)
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * deviation / math.sqrt(3)  # t quantile, 2 degrees
    assert base["final_val_loss"] == pytest.approx(mean)
    assert base["final_val_loss_low"] == pytest.approx(mean - half)
    assert base["final_val_loss_high"] == pytest.approx(mean + half)
    assert base["final_val_perplexity"] == pytest.approx(
        sum(math.exp(value) for value in BASE.values()) / 3
    ), "a mean over seeds, not the exponential of a mean"
    assert base["params_millions"] == 0.009 and base["tokens"] == 1280
    assert list(frame["verdict"]) == ["reference", "better"]
    assert frame.iloc[1]["difference"] == pytest.approx(-0.2)
    assert frame.iloc[1]["test"] == "paired t-test over seeds, two-sided"


def test_the_reference_is_the_one_that_is_asked_for(make_result: Make) -> None:
    results = [make_result("base", BASE), make_result("wide", BETTER)]

    frame = compare_experiments(results, reference="wide")

    assert list(frame["verdict"]) == ["worse", "reference"]
    assert frame.iloc[0]["difference"] == pytest.approx(0.2)


def test_one_seed_has_no_interval_and_no_verdict(make_result: Make) -> None:
    frame = compare_experiments([make_result("base", {0: 3.0}), make_result("wide", {0: 2.0})])

    assert list(frame["verdict"]) == ["reference", "one seed: no verdict"]
    assert frame["final_val_loss_low"].isna().all() and frame["p"].isna().all()
    assert frame.iloc[1]["difference"] == -1.0


def test_a_verdict_in_bits_per_byte_is_on_bits_per_byte(make_result: Make) -> None:
    worse_bytes = make_result("wide", BETTER)
    seeds = tuple(
        type(one)(**{**vars(one), "bits_per_byte": 2.0 + one.final_val_loss})
        for one in worse_bytes.seeds
    )
    wide = type(worse_bytes)(**{**vars(worse_bytes), "seeds": seeds})

    frame = compare_experiments([make_result("base", BASE), wide], metric="bits_per_byte")

    assert frame.iloc[1]["verdict"] == "worse" and frame.iloc[1]["difference"] > 3


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"validation_sha256": "0" * 64}, "different validation texts: nothing compares"),
    ({"tokenizer_sha256": "0" * 64}, "different tokenizers: compare bits_per_byte"),
    ({"train_sha256": "0" * 64}, "different training texts"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_losses_of_different_texts_are_refused(
    changes: dict[str, Any], told: str, make_result: Make, tmp_path: Path
) -> None:
    results = [make_result("base", BASE), make_result("wide", BETTER, **changes)]

    with pytest.raises(ConfigError, match=told) as error:
        compare_experiments(results, output=tmp_path / "comparison")

    assert "wide and base" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"tokenizer_sha256": "0" * 64}, {"train_sha256": "0" * 64}])
def test_bits_per_byte_compare_across_tokenizers_and_training_texts(
    changes: dict[str, Any], make_result: Make
) -> None:
    results = [make_result("base", BASE), make_result("wide", BETTER, **changes)]

    frame = compare_experiments(results, metric="bits_per_byte")

    assert frame.iloc[1]["verdict"] == "better"
    assert frame.iloc[1]["difference"] == pytest.approx(-0.1)


def test_no_metric_compares_different_validation_texts(make_result: Make) -> None:
    results = [make_result("base", BASE), make_result("wide", BETTER, validation_sha256="0" * 64)]

    with pytest.raises(ConfigError, match="different validation texts"):
        compare_experiments(results, metric="bits_per_byte")


def test_what_does_not_compare_is_told(make_result: Make) -> None:
    base, wide = make_result("base", BASE), make_result("wide", BETTER)
    cases: list[tuple[list[ExperimentResult], dict[str, str], str]] = [
        ([base], {}, "two results or more, not 1"),
        ([], {}, "two results or more, not 0"),
        ([base, base], {}, "two results are called base"),
        ([base, make_result("lost", {})], {}, "no seed has a result: lost"),
        ([base, wide], {"reference": "wid"}, "did you mean 'wide'"),
        ([base, wide], {"metric": "bits_per_bite"}, "did you mean 'bits_per_byte'"),
    ]
    for results, options, told in cases:
        with pytest.raises(ConfigError) as error:
            compare_experiments(results, **options)  # type: ignore[arg-type]
        assert told in str(error.value)


def record_of(*results: ExperimentResult, **options: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"reference": None, "metric": "final_val_loss", "title": "a study"}
    return comparison_record(results, **{**own, **options})


def test_what_is_equal_is_measured(make_result: Make) -> None:
    base = make_result("base", BASE)
    same = {"tokens": True, "params": True, "flops": True, "seconds": True}
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, set()),
        ({"params": 9080}, set()),  # within 1 %
        ({"params": 9200}, {"params"}),
        ({"tokens": 1400}, {"tokens", "flops"}),
        ({"flops_per_token": 27_000.0, "tokens": 2560}, {"tokens"}),
        ({"train_time_s": 6.0}, {"seconds"}),
    ]
    for changes, differ in cases:
        equal = record_of(base, make_result("wide", BETTER, **changes))["equal"]
        assert equal == {name: value and name not in differ for name, value in same.items()}


def test_a_band_has_the_passes_that_all_seeds_have(make_result: Make) -> None:
    base = make_result("base", BASE)
    short = type(base.seeds[0])(**{**vars(base.seeds[0]), "curve": base.seeds[0].curve[::2]})
    ragged = type(base)(**{**vars(base), "name": "ragged", "seeds": (short, *base.seeds[1:])})

    bands = record_of(base, ragged)["bands"]

    assert [point["step"] for point in bands["base"]] == [0, 5, 10]
    assert [point["step"] for point in bands["ragged"]] == [0, 10]
    last = bands["base"][-1]
    assert last["tokens"] == 1280 and last["loss"] == pytest.approx(sum(BASE.values()) / 3)
    assert last["low"] < last["loss"] < last["high"]


def test_speeds_measured_apart_stand_in_for_those_of_training(make_result: Make) -> None:
    record = record_of(
        make_result("base", BASE),
        make_result("wide", BETTER),
        facts={"speeds": {"wide": {"tokens_per_s": 42.0}}},
    )

    base, wide = record["rows"]
    assert wide["tokens_per_s"] == 42.0 and wide["tokens_per_s_low"] is None
    assert wide["train_time_s"] == pytest.approx(wide["tokens"] / 42)
    assert base["tokens_per_s"] == 257.0 and base["tokens_per_s_low"] < 257.0


def test_all_is_written_once_and_never_changed(make_result: Make, tmp_path: Path) -> None:
    results = [make_result("base", BASE), make_result("wide", BETTER)]
    folder = tmp_path / "comparison"

    frame = compare_experiments(results, output=str(folder))
    before = contents(tmp_path)

    assert {path.split("/")[1] for path in before} == {
        *("comparison.csv", "comparison.json", "report.md"),
        *("ranking.png", "curves.png", "pareto.png"),
    }
    with (folder / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(frame.columns)
    assert [float(row["final_val_loss"]) for row in rows] == list(frame["final_val_loss"])
    assert rows[0]["p"] == "" and rows[1]["verdict"] == "better"
    assert json.loads((folder / "comparison.json").read_text())["reference"] == "base"

    compare_experiments(results, output=folder)
    assert contents(tmp_path) == before, "the same again writes nothing"
    compare_experiments(results, reference="wide", output=folder)
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert len({path.split("/")[0] for path in after}) == 2


def test_policies_of_what_is_written(make_result: Make, tmp_path: Path) -> None:
    results = [make_result("base", BASE), make_result("wide", BETTER)]
    folder = tmp_path / "comparison"
    compare_experiments(results, output=folder)
    before = contents(tmp_path)

    compare_experiments(results, reference="wide", output=folder, on_exists="skip")
    assert contents(tmp_path) == before
    compare_experiments(results, reference="wide", output=folder, on_exists="replace")

    assert json.loads((folder / "comparison.json").read_text())["reference"] == "wide"
    (backup,) = tmp_path.glob("comparison.bak-*")
    old = {f"comparison/{path}": data for path, data in contents(backup).items()}
    assert old == before


def test_without_an_output_nothing_is_written(
    make_result: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    compare_experiments([make_result("base", BASE), make_result("wide", BETTER)])

    assert list(tmp_path.iterdir()) == []

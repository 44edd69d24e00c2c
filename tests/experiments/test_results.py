"""Results of experiments on disk: whole, once, never changed, and nothing else taken for one."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.errors import DataError, ModernLLMError, ProtectedPathError
from modern_llm.experiments import ExperimentResult, load_results

Make = Callable[..., ExperimentResult]
LOSSES = {0: 3.1, 1: 3.3}


def test_what_is_saved_is_what_is_loaded(make_result: Make, tmp_path: Path) -> None:
    result = make_result("wide", LOSSES, failed={"2": "exit code 5: error: diverged"}, mfu=0.25)

    path = result.save(tmp_path)

    assert path == tmp_path / "wide.json"
    assert ExperimentResult.load(path) == result


def test_the_same_twice_is_one_file_and_a_change_a_sibling(
    make_result: Make, tmp_path: Path
) -> None:
    first = make_result("wide", LOSSES).save(tmp_path)
    before = first.read_bytes()

    assert make_result("wide", LOSSES).save(tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1
    sibling = make_result("wide", {0: 3.1}).save(tmp_path)

    assert sibling != first and sibling.name.startswith("wide_")
    assert first.read_bytes() == before
    assert make_result("wide", {0: 3.1}).save(tmp_path) == sibling
    assert len(list(tmp_path.iterdir())) == 2


def test_policies(make_result: Make, tmp_path: Path) -> None:
    path = make_result("wide", LOSSES).save(tmp_path)
    before = path.read_bytes()
    changed = make_result("wide", {0: 9.0})

    changed.save(tmp_path, on_exists="skip")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]
    changed.save(tmp_path, on_exists="replace")

    assert ExperimentResult.load(path) == changed
    (backup,) = tmp_path.glob("wide.json.bak-*")
    assert backup.read_bytes() == before


def test_a_folder_that_cannot_be_written(make_result: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ProtectedPathError, match="cannot write"):
        make_result("wide", LOSSES).save(tmp_path / "file" / "experiments")


def damaged(text: str, how: str) -> str:
    value: Any = json.loads(text)
    if how == "cut":
        return text[: len(text) // 2]
    if how == "a list":
        return json.dumps([value])
    if how == "no name":
        del value["name"]
    if how == "a bad name":
        value["name"] = "../outside"
    if how == "a field too many":
        value["colour"] = "red"
    if how == "no loss":
        value["seeds"][0]["final_val_loss"] = None
    if how == "a loss of text":
        value["seeds"][0]["final_val_loss"] = "3.1"
    if how == "no text":
        del value["data"]["validation_sha256"]
    if how == "no curve":
        del value["seeds"][0]["curve"]
    if how == "seeds of numbers":
        value["seeds"] = [1, 2]
    if how == "another format":
        value["format"] = 2
    return json.dumps(value)


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "a list", "no name", "a bad name", "a field too many", "no loss"),
        *("a loss of text", "no text", "no curve", "seeds of numbers", "another format"),
    ],
)
def test_damaged_and_foreign_files_are_refused(how: str, make_result: Make, tmp_path: Path) -> None:
    path = make_result("wide", LOSSES).save(tmp_path)
    path.write_text(damaged(path.read_text(), how))

    with pytest.raises(DataError, match=r"wide\.json"):
        ExperimentResult.load(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json is no result of an experiment"):
        ExperimentResult.load(tmp_path / "none.json")


def test_values_by_seed(make_result: Make) -> None:
    result = make_result("wide", LOSSES)

    assert result.values("final_val_loss") == LOSSES
    assert result.values("params_millions") == {0: 0.009, 1: 0.009}
    assert result.values("train_flops") == {0: 54_000.0 * 1280, 1: 54_000.0 * 1280}
    assert result.values("mfu") == {}, "what is not known is no number"
    assert result.seeds[0].final_val_perplexity == pytest.approx(math.exp(3.1))


def saved_at(result: ExperimentResult, folder: Path, time_s: int) -> None:
    path = result.save(folder / "experiments")
    os.utime(path, (time_s, time_s))


def test_results_are_found_by_name_and_age(make_result: Make, tmp_path: Path) -> None:
    saved_at(make_result("old", LOSSES), tmp_path, 100)
    saved_at(make_result("new", LOSSES), tmp_path / "study", 300)
    saved_at(make_result("middle", {0: 1.0}), tmp_path, 200)
    saved_at(make_result("middle", {0: 2.0}), tmp_path / "study", 250)
    (tmp_path / "result.json").write_text("{}")  # of something else, elsewhere

    assert [result.name for result in load_results(tmp_path)] == ["new", "middle", "old"]
    assert [result.name for result in load_results(tmp_path, latest=2)] == ["new", "middle"]
    by_name = load_results(tmp_path, names=["old", "middle"])
    assert [result.name for result in by_name] == ["old", "middle"]
    assert by_name[1].values("final_val_loss") == {0: 2.0}, "the newest of a name"


def test_names_that_are_not_there_are_told_with_those_that_are(
    make_result: Make, tmp_path: Path
) -> None:
    with pytest.raises(ModernLLMError, match="no results of experiments; run some first"):
        load_results(tmp_path)
    make_result("wide", LOSSES).save(tmp_path / "experiments")

    with pytest.raises(DataError, match=r"no result of deep \(there are: wide\)"):
        load_results(tmp_path, names=["wide", "deep"])

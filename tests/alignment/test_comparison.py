import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.alignment.comparison import compare_checkpoints
from modern_llm.config import load_config
from modern_llm.errors import CheckpointError

Places = Callable[..., Any]
PERPLEXITY_ONLY = ("eval.reasoning=null", "eval.preference=null")


def result_of(place: Any, name: str = "tiny-comparison") -> Any:
    return json.loads((place.folder / "runs" / name / "comparison.json").read_text())


def compare(place: Any, *arguments: object) -> int:
    code: int = place.main(*arguments, command="compare")
    return code


def test_two_checkpoints_side_by_side(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    paths = [tiny_run.run / stage / "final" for stage in ("pretrain", "sft")]
    assert compare(here, "--checkpoints", *paths) == 0
    out = capsys.readouterr().out
    result = result_of(here)
    assert result["checkpoints"] == list(map(str, paths))
    saved = json.loads((tiny_run.run / "eval" / "result.json").read_text())["models"]
    for path, model in zip(paths, saved, strict=False):
        assert result["scores"][str(path)] == model["scores"]  # the suite of the eval stage
    (difference,) = result["differences"]
    assert difference["name"] == str(paths[1])
    assert difference["metric"] == "bits_per_byte - first"
    low, high = difference["ci95"]
    assert low <= difference["value"] <= high
    expected = "not distinguishable"
    if low > 0 or high < 0:
        expected = "worse" if low > 0 else "better"
    assert difference["verdict"] == expected
    assert expected in " ".join(out.split())
    assert "comparison.json" in out
    assert result["provenance"]["config_sha256"] == load_config(here.config).sha256()


def test_a_model_against_itself_is_not_distinguishable(place: Places, tiny_run: Any) -> None:
    here = place(tiny_run.run)
    paths = [run / "sft" / "final" for run in (here.run, tiny_run.run)]
    assert compare(here, *PERPLEXITY_ONLY, "--checkpoints", *paths) == 0
    (difference,) = result_of(here)["differences"]
    assert difference["value"] == 0
    assert difference["verdict"] == "not distinguishable"


def test_a_baseline_beside_them(
    place: Places, tiny_run: Any, gpt2_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = place()
    path = tiny_run.run / "sft" / "final"
    baselines = ("--baseline", gpt2_folder, "--baseline", "gpt2-of-nobody")
    assert compare(here, "--checkpoints", path, *PERPLEXITY_ONLY, *baselines) == 0
    result = result_of(here)
    assert set(result["scores"]) == {str(path), str(gpt2_folder)}
    (difference,) = result["differences"]
    assert difference["name"] == str(gpt2_folder)
    assert "ctx32" in difference["key"]  # what both can see
    (missing,) = result["not_evaluated"]
    assert missing["what"] == "baseline gpt2-of-nobody"
    assert "not evaluated: baseline gpt2-of-nobody" in " ".join(capsys.readouterr().out.split())


def test_results_are_protected(place: Places, tiny_run: Any) -> None:
    here = place()
    path = tiny_run.run / "sft" / "final"
    arguments = (*PERPLEXITY_ONLY, "--checkpoints", path)
    assert compare(here, *arguments) == 0
    folder = here.folder / "runs" / "tiny-comparison"
    before = (folder / "comparison.json").read_bytes()
    assert compare(here, *arguments, "--no-overwrite") == 0
    assert [p.name for p in folder.iterdir()] == ["comparison.json"]
    assert compare(here, *arguments) == 0
    assert len(list(folder.iterdir())) == 2
    assert (folder / "comparison.json").read_bytes() == before
    assert compare(here, *arguments, "--force") == 0
    assert sum("bak-" in p.name for p in folder.iterdir()) == 1


def test_wrong_checkpoints_are_refused(
    place: Places, tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    path = tiny_run.run / "sft" / "final"
    assert compare(here, "--checkpoints", path, path) == 2
    assert "names one folder twice" in capsys.readouterr().err
    assert compare(here, "--checkpoints", path, tmp_path / "none") == 4
    assert compare(here, "--checkpoints", tiny_run.run / "verifier" / "final") == 4
    assert "does not fit this model" in capsys.readouterr().err
    assert not (here.folder / "runs").exists()
    with pytest.raises(CheckpointError):
        compare_checkpoints(load_config(here.config), [tmp_path])


def test_checkpoints_of_two_sizes(place: Places, tiny_run: Any) -> None:
    """Each is scored with its own context, the difference with one that both have."""
    here = place(None, {"model.d_model": 16, "model.max_seq_len": 96, "name": "small"})
    assert here.main("--stage", "pretrain") == 0
    small = here.folder / "runs" / "small" / "pretrain" / "final"
    arguments = ("--checkpoints", tiny_run.run / "pretrain" / "final", small)
    assert compare(here, *arguments) == 0
    result = result_of(here, "small-comparison")
    (difference,) = result["differences"]
    assert "ctx96" in difference["key"]
    assert any("ctx128" in s["key"] for s in result["scores"][str(arguments[1])])

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.alignment import comparison
from modern_llm.alignment.comparison import compare_checkpoints
from modern_llm.config import load_config
from modern_llm.errors import CheckpointError
from modern_llm.models import ModernDecoderLM

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


def test_results_are_protected(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place()
    path = tiny_run.run / "sft" / "final"
    arguments = (*PERPLEXITY_ONLY, "--checkpoints", path)
    assert compare(here, *arguments) == 0
    folder = here.folder / "runs" / "tiny-comparison"
    before = (folder / "comparison.json").read_bytes()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "load_policy", refuse)  # nothing is evaluated in vain
        assert compare(here, *arguments, "--no-overwrite") == 0
    assert "comparison.json exists; left as it is" in capsys.readouterr().out
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


@pytest.mark.parametrize(
    ("arguments", "code", "rule"),
    [
        (["--checkpoints", "{sft}", "{nowhere}"], 4, "nowhere"),
        (["--checkpoints", "{sft}", "{verifier}"], 4, "does not fit this model"),
        (["--checkpoints", "{sft}", "--baseline", "x", "--baseline", "x"], 2, "one model twice"),
        (["--checkpoints", "{sft}", "--baseline", "{sft}"], 2, "one model twice"),
        (["--checkpoints", "{sft}", "eval.reasoning.max_new_tokens=200"], 2,
         "sft/final: eval.reasoning.max_new_tokens=200 leaves no room for a prompt"),
        (["--checkpoints", "{sft}", "eval.sample_tokens=126"], 2, "eval.sample_tokens=126"),
        (["--checkpoints", "{sft}", "eval.preference.source.name=gsm8k"], 2, "gsm8k"),
        (["--checkpoints", "{sft}", "eval.preference.source.kind=text"], 2, "kind 'text'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_first_forward(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, rule: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(ModernDecoderLM, "forward", refuse)
    here = place()
    places = {s: tiny_run.run / s / "final" for s in ("sft", "verifier", "nowhere")}
    assert compare(here, *(argument.format(**places) for argument in arguments)) == code
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--dry-run", "--resume", "--allow-data-change", "--max-steps=3"]
)  # fmt: skip
def test_flags_that_would_do_nothing_are_unknown(
    place: Places, tiny_run: Any, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.raises(SystemExit) as done:
        compare(place(), "--checkpoints", tiny_run.run / "sft" / "final", flag)
    assert done.value.code == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a model was evaluated")


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

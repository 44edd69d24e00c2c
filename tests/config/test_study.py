"""Studies: those that come with the package load whole, and every mistake is one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.cli import main
from modern_llm.config import as_overrides, list_studies, load_config, load_study
from modern_llm.config.loading import json_schema
from modern_llm.errors import ConfigError
from modern_llm.experiments.study import Study

GOOD: dict[str, Any] = {
    "base": "local-smoke",
    "arms": {"plain": {}, "wide": {"model.d_model": 128}},
    "seeds": [0, 1],
}
Write = Callable[..., Path]


@pytest.fixture
def write_study(tmp_path: Path) -> Write:
    """File of a good study with changes: ``write_study(seeds=[0, 0])``; ``None`` leaves one out."""

    def write(**changes: Any) -> Path:
        raw = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(raw))
        return path

    return write


@pytest.mark.parametrize("mode", ["full", "demo"])
@pytest.mark.parametrize("name", list_studies())
def test_every_study_loads_and_its_arms_are_legal(name: str, mode: str, tmp_path: Path) -> None:
    config = load_study(name, mode=mode)
    study = Study(config, output=tmp_path)

    assert config.name == (name if mode == "full" else f"{name}-demo")
    assert study.reference in config.changes()
    if config.grid:
        assert set(study._overrides) <= set(config.changes())
    else:
        assert study.left_out == [] and set(study._overrides) == set(config.changes())
    fields = set(json_schema()["$defs"]["ModelConfig"]["properties"])
    changed = {*config.overrides, *(f for row in config.changes().values() for f in row)}
    assert {f.split(".")[1] for f in changed if f.startswith("model.")} <= fields
    assert list(tmp_path.iterdir()) == [], "a study that was not run writes nothing"


def test_a_demo_changes_what_it_says_and_keeps_the_rest() -> None:
    full, demo = load_study("heads", mode="full"), load_study("heads", mode="demo")

    assert demo.overrides["pretrain.training.max_steps"] < 100
    assert demo.overrides["model.d_model"] == full.overrides["model.d_model"] == 320
    assert demo.arms == full.arms and demo.seeds != full.seeds


def test_the_command_line_goes_before_the_file(write_study: Write) -> None:
    path = write_study(overrides={"model.n_layers": 2, "model.bias": True})

    config = load_study(str(path), seeds=[5], hold="flops", overrides={"model.n_layers": 3})

    assert (config.name, config.seeds, config.hold) == ("mine", [5], "flops")
    assert config.overrides == {"model.n_layers": 3, "model.bias": True}


def test_yaml_studies(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: local-smoke\narms:\n  a: {}\n  b: {model.norm: layernorm}\n")

    assert load_study(str(path)).changes() == {"a": {}, "b": {"model.norm": "layernorm"}}


def test_a_study_over_another(write_study: Write) -> None:
    path = write_study(base=None, arms=None, extends="heads", seeds=[7])

    config, below = load_study(str(path)), load_study("heads")

    assert (config.name, config.seeds, config.arms) == ("mine", [7], below.arms)


def test_changes_of_a_grid_are_its_product(write_study: Write) -> None:
    path = write_study(arms=None, grid={"model.n_heads": [2, 4], "model.norm": ["rmsnorm"]})

    assert load_study(str(path)).changes() == {
        "n_heads2-normrmsnorm": {"model.n_heads": 2, "model.norm": "rmsnorm"},
        "n_heads4-normrmsnorm": {"model.n_heads": 4, "model.norm": "rmsnorm"},
    }


def test_overrides_keep_kinds_of_values() -> None:
    overrides = as_overrides({"model.norm": "layernorm", "model.bias": True, "model.softcap": None})

    model = load_config("local-smoke", overrides).model
    assert (model.norm.name, model.bias, model.softcap) == ("layernorm", True, None)


def test_a_grid_leaves_illegal_cells_out_and_says_so(write_study: Write, tmp_path: Path) -> None:
    path = write_study(arms=None, grid={"model.n_heads": [2, 4, 5], "model.d_model": [64]})

    study = Study(load_study(str(path)), output=tmp_path / "out")

    assert list(study._overrides) == ["n_heads2-d_model64", "n_heads4-d_model64"]
    (told,) = study.left_out
    assert "n_heads5-d_model64: " in told and "d_model=64 is not a multiple of n_heads=5" in told


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"colour": "red"}, ["colour", "unknown field"]),
    ({"arm": {}}, ["did you mean 'arms'"]),
    ({"arms": {"a/b": {}, "ok": {}}}, ["run name 'a/b'", "use letters"]),
    ({"arms": {"": {}, "ok": {}}}, ["run name ''"]),
    ({"name": "../up"}, ["run name '../up'"]),
    ({"reference": "wid"}, ["reference='wid' is no arm", "did you mean 'wide'"]),
    ({"hold": "money"}, ["hold='money'", "'tokens', 'params', 'flops' or 'seconds'"]),
    ({"hold": "seconds"}, ["hold=seconds needs speed_rounds"]),
    ({"seeds": [0, 1, 0]}, ["seeds=[0, 1, 0]: each once"]),
    ({"seeds": []}, ["seeds=[]"]),
    ({"seeds": [-1]}, ["seeds.0=-1"]),
    ({"grid": {"model.n_heads": [2, 4]}}, ["give arms or grid, one of them"]),
    ({"arms": None}, ["give arms or grid, one of them"]),
    ({"base": None}, ["base: is required"]),
    ({"extends": "head"}, ["unknown study 'head'", "did you mean 'heads'"]),
    ({"extends": "components-wikitext2"}, ["extends: unknown field"]),
    ({"base": "local-smok"}, ["unknown preset 'local-smok'", "did you mean 'local-smoke'"]),
    ({"threads": 0}, ["threads=0"]),
    ({"budget_s": 0}, ["budget_s=0"]),
    ({"arms": {"only": {}}}, ["two legal arms or more"]),
    ({"arms": {"a": {}, "b": {"model.d_modl": 3}}}, ["b: ", "d_modl", "did you mean 'd_model'"]),
    ({"arms": {"a": {}, "b": {"model.norm": "rmsnom"}}}, ["b: ", "did you mean 'rmsnorm'"]),
    ({"arms": {"a": {}, "b": {"model.n_heads": 5}}}, ["b: ", "is not a multiple of n_heads=5"]),
    (
        {"arms": None, "grid": {"model.position": [{"name": "rope", "theta": 1}, "learned"]}},
        ["run name", "use letters"],
    ),
    ({"arms": None, "grid": {"model.n_heads": [5, 7]}}, ["two legal arms or more", "n_heads7"]),
    ({"overrides": {"pretrain.training.seed": 3}}, ["pretrain.training.seed: say it by seeds"]),
    ({"overrides": {"training.threads": 3}}, ["training.threads: say it by threads"]),
]


@pytest.mark.parametrize(("changes", "parts"), BAD, ids=[str(list(case[0])) for case in BAD])
def test_a_bad_study_is_one_message_and_nothing_is_written(
    changes: dict[str, Any],
    parts: list[str],
    write_study: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_study(**changes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modern_llm.experiments.study.run_cells", lambda *_, **__: 1 / 0)

    assert main(["experiment", str(path), "--output-dir", str(tmp_path / "out")]) == 2

    told = capsys.readouterr().err
    assert told.count("error: ") == 1 and "Traceback" not in told
    for part in parts:
        assert told.count(part) >= 1, told
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiment", "head"], "unknown study 'head'; did you mean 'heads'"),
        (["experiment", "none.json"], "none.json: no such study file"),
        (["experiment", "heads", "model.bias"], "model.bias: write section.field=value"),
        (["experiment", "heads", "--jobs", "0"], "jobs=0: at least 1"),
        (["experiment", "heads", "--hold", "money"], "hold='money'"),
        (["experiment", "heads", "--reference", "head-5"], "did you mean 'heads-5'"),
        (["compare-architectures"], "give names of experiments, or --latest N"),
        (["compare-architectures", "a", "--latest", "2"], "give names of experiments, or --latest"),
        (["compare-architectures", "--latest", "1"], "needs two or more"),
        (["compare-architectures", "--latest", "2", "--name", "../up"], "--name: run name '../up'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], told: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    assert main(arguments) == 2

    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and told in error
    assert list(tmp_path.iterdir()) == []


def test_results_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["compare-architectures", "wide", "deep"]) == 3

    assert "no result of wide, deep (there are: none)" in capsys.readouterr().err


def test_seeds_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["experiment", "heads", "--seeds", "0,x"])

    assert stopped.value.code == 2
    assert "'0,x': write numbers with commas between, such as 0,1,2" in capsys.readouterr().err


@pytest.mark.parametrize("demo", ["small", ["a"], 3])
def test_a_demo_that_is_no_section(
    demo: object, write_study: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(demo=demo)

    assert main(["experiment", str(path), "--mode", "demo"]) == 2
    assert "should be a section" in capsys.readouterr().err


def test_a_study_without_a_demo(write_study: Write) -> None:
    with pytest.raises(ConfigError, match="has no section 'demo': give --mode full"):
        load_study(str(write_study()), mode="demo")

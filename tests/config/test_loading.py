import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import (
    TRAINED_STAGES,
    Component,
    PipelineConfig,
    get_pipeline_preset,
    list_presets,
    load_config,
)
from modern_llm.config.loading import merge
from modern_llm.errors import ConfigError

Write = Callable[[str, Any], Path]

SMALL: dict[str, Any] = {
    "model": {"vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32},
    "training": {"max_steps": 10, "lr": 1e-3},
    "pretrain": {"data": [{"name": "synthetic", "weight": 1}]},
    "sft": {"data": ["alpaca"], "training": {"lr": 2e-3}},
    "dpo": {"data": ["hh-rlhf"], "max_prompt_tokens": 16, "max_answer_tokens": 16},
    "verifier": {"data": ["gsm8k"], "training": {"lr": 3e-3, "max_steps": 5}},
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return call


@pytest.fixture
def small(write: Write) -> Path:
    return write("small.json", SMALL)


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as told:
        load_config(path, overrides)
    return str(told.value)


# --- extends and merging ------------------------------------------------------------------------


def test_a_file_states_what_differs(write: Write, small: Path) -> None:
    write("middle.json", {"extends": "small.json", "model": {"d_model": 32}, "seed": 4})
    top = write("top.json", {"extends": "middle.json", "model": {"n_heads": 4}, "seed": 5})
    config = load_config(top)
    assert (config.name, config.seed) == ("top", 5)
    assert (config.model.d_model, config.model.n_heads, config.model.n_layers) == (32, 4, 1)
    assert config.sft.training.lr == 2e-3
    assert load_config(small).name == "small"


def test_extends_looks_beside_the_file_first(
    write: Write, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which parent is meant does not depend on where the command is run."""
    write("elsewhere/small.json", {**SMALL, "seed": 99})
    top = write("top.json", {"extends": "small.json"})
    monkeypatch.chdir(top.parent / "elsewhere")
    assert load_config(top).seed == 0
    assert load_config("small.json").seed == 99  # a path on the command line is as typed


def test_extends_names_a_preset_or_a_path_in_any_format(write: Write, small: Path) -> None:
    child = write("child.yaml", "extends: local-smoke\nseed: 3\n")
    assert load_config(child).model == get_pipeline_preset("local-smoke").model
    assert load_config(child).seed == 3
    absolute = write("a/b.yml", f"extends: {small}\nmodel:\n  bias: true\n")
    assert load_config(absolute).model.bias


def test_extends_in_a_circle_is_refused(write: Write) -> None:
    write("a.json", {"extends": "b.json"})
    write("b.json", {"extends": "c.json"})
    path = write("c.json", {"extends": "a.json"})
    assert "extends itself through c.json -> a.json -> b.json" in refusal(path)
    assert "extends itself" in refusal(write("self.json", {"extends": "self.json"}))


def test_a_missing_parent_is_told(write: Write) -> None:
    assert "no such config file" in refusal(write("a.json", {"extends": "gone.json"}))
    told = refusal(write("a.json", {"extends": "local-smok"}))
    assert "unknown preset 'local-smok'; did you mean 'local-smoke'?" in told


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"d": 3}}, {"a": 1, "b": {"c": 1, "d": 3}}),
        ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),  # lists whole
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        (  # a component that is named anew does not inherit options
            {"p": {"name": "rope", "theta": 5}},
            {"p": {"name": "learned"}},
            {"p": {"name": "learned"}},
        ),
        ({"p": {"name": "rope", "theta": 5}}, {"p": "none"}, {"p": "none"}),
        (  # one that is not named keeps the name below
            {"p": {"name": "rope", "theta": 5}},
            {"p": {"theta": 6}},
            {"p": {"name": "rope", "theta": 6}},
        ),
        ({"p": "rope"}, {"p": {"theta": 6}}, {"p": {"name": "rope", "theta": 6}}),
    ],
)
def test_merging(below: Any, above: Any, expected: Any) -> None:
    before = json.dumps([below, above])
    assert merge(below, above) == expected
    assert json.dumps([below, above]) == before


# --- overrides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "find", "expected"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("model.bias=true", lambda c: c.model.bias, True),
        ("model.bias=False", lambda c: c.model.bias, False),
        ("model.norm=layernorm", lambda c: c.model.norm, Component("layernorm")),
        ("model.dropout=1e-1", lambda c: c.model.dropout, 0.1),
        ("training.betas=[0.8, 0.9]", lambda c: c.dpo.training.betas, (0.8, 0.9)),
        ("training.threads=None", lambda c: c.sft.training.threads, None),
        ("training.warmup=5", lambda c: c.sft.training.warmup, 5),
        ("training.warmup=0.5", lambda c: c.sft.training.warmup, 0.5),
        ("description=a=b", lambda c: c.description, "a=b"),
        ("data.root=/a b", lambda c: str(c.data.root), "/a b"),
        ("sft.data.0.files=[]", lambda c: c.sft.data[0].options, {"files": []}),
        ("pretrain.data.0.weight=2", lambda c: c.pretrain.data[0].weight, 2.0),
        ('sft.data=["x", "y"]', lambda c: [s.name for s in c.sft.data], ["x", "y"]),
        ("model.position.theta=5", lambda c: c.model.position, Component("rope", theta=5)),
        ("model.position=none", lambda c: c.model.position, Component("none")),
        (
            'model.position={"name": "rope", "theta": 3}',
            lambda c: c.model.position,
            Component("rope", theta=3),
        ),
        ("training.schedule.decay=0.1", lambda c: c.dpo.training.schedule.options, {"decay": 0.1}),
        ("model.moe.n_experts=4", lambda c: c.model.moe.n_experts, 4),
        ("eval.prompts=[]", lambda c: c.eval.prompts, []),
    ],
)
def test_an_override_sets_any_field(small: Path, item: str, find: Any, expected: Any) -> None:
    assert find(load_config(small, [item])) == expected


def test_an_override_goes_below_null(write: Write) -> None:
    path = write("a.json", {**SMALL, "model": {**SMALL["model"], "moe": None}})
    assert load_config(path, ["model.moe.n_experts=3"]).model.moe is not None


def test_training_for_all_stages_wins_over_their_own(small: Path) -> None:
    assert load_config(small).sft.training.lr == 2e-3
    config = load_config(small, ["training.lr=5e-4", "training.optimizer.name=muon"])
    assert {config.stage(s).training.lr for s in TRAINED_STAGES} == {5e-4}
    assert {config.stage(s).training.optimizer.name for s in TRAINED_STAGES} == {"muon"}
    assert config.verifier.training.max_steps == 5  # what was not named stays the stage's own
    both = load_config(small, ["training.lr=5e-4", "dpo.training.lr=1e-5"])
    assert [both.stage(s).training.lr for s in TRAINED_STAGES] == [5e-4, 5e-4, 1e-5, 5e-4]
    assert load_config(small, ["dpo.training.lr=1e-5", "training.lr=5e-4"]) == both
    twice = load_config(small, ["training.lr=1", "training.lr=5e-4", "dpo.training.lr=1e-5"])
    assert twice == both  # of two for the same field the last one counts


def test_max_steps_caps_every_stage(small: Path) -> None:
    config = load_config(small, ["max_steps=7"])
    assert [config.stage(s).training.max_steps for s in TRAINED_STAGES] == [7, 7, 7, 5]


def test_bad_overrides_are_told_all_at_once(small: Path) -> None:
    told = refusal(small, "seed", "=3", "a..b=1", "sft.data.5.weight=1", "sft.data.x=1")
    write_it = "write section.field=value, such as training.lr=3e-4"
    assert told.splitlines() == [
        f"override 'seed': {write_it}",
        f"override '=3': {write_it}",
        f"override 'a..b=1': {write_it}",
        "override 'sft.data.5.weight=1': '5' is no index into a list of 1",
        "override 'sft.data.x=1': 'x' is no index into a list of 1",
    ]
    assert "there is nothing below '7'" in refusal(small, "seed=7", "seed.x.y=1")


def test_overrides_do_not_leak_into_the_next_load(small: Path) -> None:
    load_config(small, ["sft.data.0.files=[]", "training.lr=1", "model.position.theta=5"])
    assert load_config(small) == load_config(small)
    assert load_config(small).sft.training.lr == 2e-3


# --- aliases ------------------------------------------------------------------------------------

ALIASES = {  # as the documentation lists them
    "n_embd": ("d_model", 32),
    "hidden_size": ("d_model", 32),
    "n_layer": ("n_layers", 3),
    "num_layers": ("n_layers", 3),
    "n_head": ("n_heads", 4),
    "num_heads": ("n_heads", 4),
    "block_size": ("max_seq_len", 64),
    "normalization": ("norm", "layernorm"),
    "norm_type": ("norm", "layernorm"),
    "position_encoding": ("position", "learned"),
    "pos_type": ("position", "learned"),
    "ffn_type": ("ffn", "standard"),
    "attention_type": ("attention", "full"),
    "weight_tying": ("tie_embeddings", False),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_serves_in_files_and_on_the_command_line(write: Write, alias: str) -> None:
    field, value = ALIASES[alias]
    own = {k: v for k, v in SMALL["model"].items() if k != field}
    in_file = load_config(write("a.json", {**SMALL, "model": {**own, alias: value}}))
    path = write("small.json", SMALL)
    typed = load_config(path, [f"model.{alias}={json.dumps(value)}"])
    plain = load_config(path, [f"model.{field}={json.dumps(value)}"])
    assert in_file.model == typed.model == plain.model
    child = write("child.json", {"extends": "small.json", "model": {alias: value}})
    assert load_config(child).model == plain.model


def test_a_field_under_two_names_is_refused(write: Write) -> None:
    path = write("a.json", {**SMALL, "model": {**SMALL["model"], "n_embd": 3}})
    assert "'n_embd' and 'd_model' are the same field; give it once" in refusal(path)
    assert "are the same field" in refusal("local-smoke", 'model={"n_embd": 3, "d_model": 3}')


def test_an_alias_changes_an_option_of_a_component(small: Path) -> None:
    config = load_config(small, ["model.pos_type.theta=9"])
    assert config.model.position == Component("rope", theta=9)


# --- files --------------------------------------------------------------------------------------


def test_yaml_reads_as_json_does(write: Write, small: Path) -> None:
    yaml = """
model: {vocab_size: 300, d_model: 16, n_layers: 1, n_heads: 2, max_seq_len: 32}
training: {max_steps: 10, lr: 1e-3}
pretrain:
  data: [{name: synthetic, weight: 1}]
sft: {data: [alpaca], training: {lr: 2.0e-3}}
dpo: {data: [hh-rlhf], max_prompt_tokens: 16, max_answer_tokens: 16}
verifier: {data: [gsm8k], training: {lr: 3.0e-3, max_steps: 5}}
"""
    found = load_config(write("small.yaml", yaml))
    assert found.model_dump(exclude={"training"}) == load_config(small).model_dump(
        exclude={"training"}
    )
    assert found.sha256() == load_config(small).sha256()


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/new:os.system ['touch {canary}']",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!python/object/apply:subprocess.call [['touch', '{canary}']]",
    ],
)
def test_code_in_yaml_is_refused_and_not_run(write: Write, tmp_path: Path, payload: str) -> None:
    canary = tmp_path / "canary"
    path = write("evil.yaml", f"seed: {payload.format(canary=canary)}\n")
    told = refusal(path)
    assert str(path) in told and "could not determine a constructor" in told
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("a.json", "", "cannot be read as json"),
        ("a.json", '{"seed": 1,}', "cannot be read as json"),
        ("a.json", "[1]", "must hold one object of sections, has list"),
        ("a.json", "3", "must hold one object of sections, has int"),
        ("a.yaml", "", "must hold one object of sections, has NoneType"),
        ("a.yaml", "a: [1", "cannot be read as yaml"),
        ("a.yml", "\tx: 1", "cannot be read as yml"),
        ("a.json", '{"sft": {"training": {"lr": 1, "lr": 2}}}', "'lr' is given twice"),
        ("a.yaml", "seed: 1\nname: a\nseed: 1", "'seed' is given twice"),
        ("a.yaml", "[1]: 2", "cannot be read as yaml"),
        ("a.yaml", "seed: !!python/object/apply:os.system [exit]", "cannot be read as yaml"),
    ],
)
def test_a_malformed_file_is_told(write: Write, name: str, text: str, rule: str) -> None:
    path = write(name, text)
    told = refusal(path)
    assert str(path) in told and rule in told


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00{")
    assert f"{path}: cannot be read as json" in refusal(path)
    (tmp_path / "folder.json").mkdir()
    assert "no such config file" in refusal(tmp_path / "folder.json")


def test_an_unknown_preset_suggests_one() -> None:
    told = refusal("local-smoek")
    assert "unknown preset 'local-smoek'; did you mean 'local-smoke'?" in told
    assert all(name in told for name in list_presets())
    assert "unknown preset '../secret'" in refusal("../secret")
    assert "unknown preset ''" in refusal("")
    assert "nowhere.json: no such config file" in refusal("nowhere.json")


def test_the_resolved_config_loads_again_and_is_the_same(tmp_path: Path, small: Path) -> None:
    for name in (*list_presets(), str(small)):
        config = load_config(name)
        path = tmp_path / "again.json"
        path.write_text(str(config))
        again = load_config(path)
        assert again.sha256() == config.sha256()
        assert again == config
        assert PipelineConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_feed_forward_named_anew_does_not_inherit_the_activation(tmp_path: Path) -> None:
    below = tmp_path / "below.json"
    model = {"ffn": "standard", "activation": "relu"}
    below.write_text(json.dumps({"extends": "local-smoke", "model": model}))
    assert load_config(below, ["model.ffn=swiglu"]).model.activation == "gelu"
    assert load_config(below, ["model.ffn=standard"]).model.activation == "gelu"
    both = load_config(below, ["model.ffn=standard", "model.activation=silu"])
    assert both.model.activation == "silu"
    above = tmp_path / "above.json"
    above.write_text(json.dumps({"extends": "below.json", "model": {"ffn": "geglu"}}))
    assert load_config(above).model.activation == "gelu"
    with pytest.raises(ConfigError, match="no effect with ffn=swiglu"):
        load_config(below, ["model.ffn=swiglu", "model.activation=relu"])

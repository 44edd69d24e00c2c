"""The presets and the schema of `configs/`, and what the hash of a config covers."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from pydantic import BaseModel

from modern_llm.config import (
    TRAINED_STAGES,
    Component,
    PipelineConfig,
    get_pipeline_preset,
    json_schema,
    list_presets,
    load_config,
)
from modern_llm.config.loading import presets_folder
from modern_llm.config.schema import SourceConfig
from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM

FILES = sorted(
    path
    for path in presets_folder().rglob("*.json")
    if path.name != "schema.json" and path.parent.name != "studies"
)
PRESETS = list_presets()


def parameters(name: str) -> int:
    with torch.device("meta"):
        model = ModernDecoderLM(get_pipeline_preset(name).model)
    return sum(p.numel() for p in model.parameters())


# --- presets ------------------------------------------------------------------------------------


def test_the_presets_that_are_promised_are_there() -> None:
    assert {"local-smoke", "local", "tacc-smoke", "tacc"} <= set(PRESETS)
    assert "schema" not in PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_prints_and_says_what_it_is(name: str) -> None:
    config = get_pipeline_preset(name)
    assert json.loads(str(config)) == config.model_dump(mode="json")
    assert config.name == name
    assert len(config.description) > 20
    assert config.stage("sft").training.seq_len <= config.model.max_seq_len


def test_the_flagship_has_253_million_parameters() -> None:
    tacc = get_pipeline_preset("tacc")
    assert parameters("tacc") == pytest.approx(253e6, rel=0.03)
    assert tacc.model.position.name == "rope"
    assert tacc.model.norm.name == "rmsnorm"
    assert tacc.model.ffn.name == "swiglu"
    assert tacc.model.n_kv_heads < tacc.model.n_heads
    assert tacc.tokenizer.name == "gpt2" and tacc.model.vocab_size >= 50257 + 5
    training = tacc.pretrain.training
    tokens = training.max_steps * training.batch_size * training.seq_len
    assert tokens == pytest.approx(600e6, rel=0.01)
    assert {s.name for s in tacc.pretrain.data} == {"wikitext103", "tinystories"}
    assert {training.precision, training.device} == {"bf16", "cuda"}


def test_the_smoke_preset_of_the_cluster_is_small_and_the_same_path() -> None:
    tacc, smoke = get_pipeline_preset("tacc"), get_pipeline_preset("tacc-smoke")
    assert parameters("tacc-smoke") < 0.1 * parameters("tacc")
    assert smoke.pretrain.data == tacc.pretrain.data
    assert smoke.tokenizer == tacc.tokenizer
    assert {smoke.stage(s).training.max_steps for s in TRAINED_STAGES} == {20}


def test_local_smoke_needs_nothing() -> None:
    config = get_pipeline_preset("local-smoke")
    sources = [source for stage in TRAINED_STAGES for source in config.stage(stage).data]
    assert {source.name for source in sources} == {"synthetic"}
    assert config.tokenizer.name in ("bpe", "char")


# --- JSON Schema --------------------------------------------------------------------------------


def test_the_schema_file_is_current() -> None:
    stored = json.loads((presets_folder() / "schema.json").read_text())
    assert stored == json_schema(), "run: modern-llm schema > configs/schema.json"
    jsonschema.Draft202012Validator.check_schema(stored)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_config_file_is_valid_by_the_schema_and_names_it(path: Path) -> None:
    raw = json.loads(path.read_text())
    jsonschema.validate(raw, json_schema())
    assert (path.parent / raw["$schema"]).resolve() == presets_folder() / "schema.json"


@pytest.mark.parametrize(
    ("section", "valid"),
    [
        ({"model": {"d_model": 3}}, True),  # a part of a section is enough: the rest is extended
        ({"model": {"n_embd": 3, "norm_type": "layernorm"}}, True),
        ({"model": {"position": {"theta": 5}}}, True),
        ({"extends": "tacc"}, True),
        ({"sft": {"data": ["alpaca", {"name": "jsonl", "path": "x"}]}}, True),
        ({"model": {"d_modl": 3}}, False),
        ({"model": {"d_model": "wide"}}, False),
        ({"model": {"norm_position": "sideways"}}, False),
        ({"colour": 1}, False),
        ({"sft": {"data": [{"path": "x"}]}}, False),
        ({"dpo": {"beta": -1}}, False),
    ],
)
def test_the_schema_tells_right_from_wrong(section: Any, valid: bool) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(section) == valid


# --- what the hash of a config covers -----------------------------------------------------------

NEUTRAL = {  # names, places and logging change no number
    "name",
    "description",
    "training",  # shared defaults: what counts is what each stage made of them
    *("paths.output", "paths.report", "paths.ledger", "data.root", "data.cache_dir"),
    *(
        f"{s}.training.{k}"
        for s in TRAINED_STAGES
        for k in ("log_every", "grad_log_every", "save_every", "keep_last", "trackers")
    ),
    # No number beyond rounding: a checkpoint of one engine goes on in another.
    *(f"{s}.training.distributed" for s in TRAINED_STAGES),
    "rank_timeout_s",
}


def leaves(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every field of a config that holds no further section, with its value."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel) and not isinstance(value, Component | SourceConfig):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def another(name: str, value: Any) -> Any:
    """Some other value; it need not be valid, since only the hash is asked for."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, Component | SourceConfig):
        return type(value)(name="another")
    if isinstance(value, str | Path):
        return type(value)(f"{value}x")
    if isinstance(value, list | tuple):
        return type(value)([*value, *(value or ["x"])])
    return {**value, "x": 1} if isinstance(value, dict) else "x"


def replaced(section: Any, dotted: str, value: Any) -> Any:
    name, _, rest = dotted.partition(".")
    inner = replaced(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: inner})


BASE = load_config("local-smoke", ["model.moe.n_experts=2"])


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("name", leaves(BASE))
def test_the_hash_covers_every_field_that_can_change_a_number(name: str) -> None:
    value = another(name, leaves(BASE)[name])
    changed = replaced(BASE, name, value)
    assert leaves(changed)[name] != leaves(BASE)[name]
    assert (changed.sha256() == BASE.sha256()) == (name in NEUTRAL)


def test_the_neutral_fields_exist() -> None:
    assert set(leaves(BASE)) >= NEUTRAL


def test_the_hash_does_not_depend_on_how_a_value_is_written() -> None:
    plain = get_pipeline_preset("local-smoke")
    same = [
        [f"pretrain.training.lr={plain.pretrain.training.lr:.12e}"],
        [f'model.norm={{"name": "{plain.model.norm.name}"}}'],
        [f"model.n_embd={plain.model.d_model}"],
        [f'seed="{plain.seed}"'],
        ["name=other", "paths.output=/x", "training.log_every=1", "training.keep_last=7"],
    ]
    for overrides in same:
        assert load_config("local-smoke", overrides).sha256() == plain.sha256()


def test_a_config_is_frozen() -> None:
    config = get_pipeline_preset("local-smoke")
    with pytest.raises(ValueError, match="frozen"):
        config.model.d_model = 3  # type: ignore[misc]
    assert isinstance(config, PipelineConfig)
    with pytest.raises(ConfigError, match="unknown preset"):
        get_pipeline_preset("nothing")


# --- architectures ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["", "-full"])
def test_the_architectures_differ_where_they_say(size: str) -> None:
    gpt2, llama = (get_pipeline_preset(f"{name}{size}").model for name in ("gpt2", "llama"))
    assert (gpt2.position.name, gpt2.norm.name, gpt2.ffn.name) == (
        "learned", "layernorm", "standard",
    )  # fmt: skip
    assert gpt2.d_ff == 4 * gpt2.d_model and gpt2.tie_embeddings and gpt2.bias
    assert (llama.position.name, llama.norm.name, llama.ffn.name) == ("rope", "rmsnorm", "swiglu")
    assert llama.d_ff * 3 == gpt2.d_ff * 2 and not llama.tie_embeddings
    assert get_pipeline_preset(f"team{size}").model == llama
    for name in ("hybrid", "custom"):
        model = get_pipeline_preset(f"{name}{size}").model
        assert (model.n_layers, model.d_model) == (gpt2.n_layers, gpt2.d_model)


def test_the_full_gpt2_has_124_million_parameters() -> None:
    assert parameters("gpt2-full") == pytest.approx(124.4e6, rel=0.001)


# --- the setting that nanoGPT's README gives for a CPU -------------------------------------------


def test_nanogpt_cpu_has_the_size_of_its_model() -> None:
    """Of nanoGPT's ``model.py`` with bias=False, but for the rows of its 65 characters."""
    width, layers, context, vocab_size = 128, 4, 64, 261
    block = 3 * width**2 + width**2 + 2 * 4 * width**2 + 2 * width  # qkv, out, up and down, norms
    assert parameters("nanogpt-cpu") == (vocab_size + context) * width + layers * block + width


def test_speed_is_trained_and_scored_on_the_same_text_and_context() -> None:
    peer, ours = (get_pipeline_preset(name) for name in ("nanogpt-cpu", "speed"))
    for config in (peer, ours):
        assert [source.name for source in config.pretrain.data] == ["tinyshakespeare"]
        assert config.pretrain.max_validation_rows is None
        assert config.pretrain.training.seq_len == 64
    assert (peer.tokenizer, peer.model.vocab_size) == (ours.tokenizer, ours.model.vocab_size)
    assert ours.pretrain.training.max_steps < peer.pretrain.training.max_steps

"""Names that other projects have for fields and choices load in every form of a config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from modern_llm.config import PipelineConfig, load_config
from modern_llm.config.model import ALIASES, NAMES
from modern_llm.config.train_flags import sections
from modern_llm.models.ffn import ACTIVATIONS, FFNS
from modern_llm.models.norms import NORMS
from modern_llm.models.positions import POSITIONS

Load = Callable[[dict[str, Any]], PipelineConfig]
STANDARD, WINDOW = {"ffn_type": "ff_standard"}, {"window": 32}
CASES: list[tuple[str, Any, str, Any, dict[str, Any]]] = [  # theirs, ours, what it needs beside it
    ("n_embd", 192, "d_model", 192, {}),
    ("hidden_size", 192, "d_model", 192, {}),
    ("n_layer", 3, "n_layers", 3, {}),
    ("num_layers", 3, "n_layers", 3, {}),
    ("n_head", 8, "n_heads", 8, {}),
    ("num_heads", 8, "n_heads", 8, {}),
    ("block_size", 64, "max_seq_len", 64, {}),
    ("normalization", "layernorm", "norm", "layernorm", {}),
    ("norm_type", "rms", "norm", "rmsnorm", {}),
    ("norm_type", "rms_norm", "norm", "rmsnorm", {}),
    ("norm_type", "ln", "norm", "layernorm", {}),
    ("norm_type", "layer_norm", "norm", "layernorm", {}),
    ("norm_type", "layer_norm_nobias", "norm", "layernorm_nobias", {}),
    ("norm_type", "scale_norm", "norm", "scalenorm", {}),
    ("position_encoding", "alibi", "position", "alibi", {}),
    ("pos_type", "learned_absolute", "position", "learned", {}),
    ("pos_type", "absolute", "position", "learned", {}),
    ("pos_type", "rotary", "position", "rope", {}),
    ("pos_type", "nope", "position", "none", {}),
    ("attention_type", "flash_attention", "attention", "full", {}),
    ("attention_type", "local_window", "attention", "window", WINDOW),
    ("attention_type", "local_window_attention", "attention", "window", WINDOW),
    ("attention_type", "linear_attention", "attention", "linear", {}),
    ("ffn_type", "ff_standard", "ffn", "standard", {}),
    ("ffn_type", "ff_swiglu", "ffn", "swiglu", {}),
    ("ffn_type", "ff_geglu", "ffn", "geglu", {}),
    ("ffn_type", "ff_relu2", "ffn", "relu2", {}),
    ("ffn_type", "ff_moe", "moe.n_experts", 8, {}),
    ("ffn_type", "moe", "ffn", "swiglu", {}),  # the experts
    ("ffn_type", "mlp", "ffn", "standard", {}),
    ("activation", "gelu_new", "activation", "gelu_tanh", STANDARD),
    ("activation", "swish", "activation", "silu", STANDARD),
    ("activation", "relu", "activation", "relu", STANDARD),
    ("weight_tying", False, "tie_embeddings", False, {}),
]


def test_every_name_is_here() -> None:
    assert {theirs for theirs, *_ in CASES} >= ALIASES.keys()
    tested = {value for _, value, *_ in CASES if isinstance(value, str)}
    assert tested >= {name for names in NAMES.values() for name in names}


@pytest.mark.parametrize(
    ("field", "registry"),
    [("norm", NORMS), ("position", POSITIONS), ("ffn", FFNS), ("activation", ACTIVATIONS)],
)
def test_aliases_of_registries_are_names_too(field: str, registry: Any) -> None:
    """A checkpoint then says one thing by one name: `learned` and `learned_absolute` are equal."""
    for alias, name in registry._aliases.items():
        assert NAMES[field][alias] == name


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(params=["override", "section", "flat", "flat with a preset"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Load:
    """Load these names in one of the forms that a config has, on top of an architecture preset."""

    def call(names: dict[str, Any]) -> PipelineConfig:
        if request.param == "override":
            overrides = [f"model.{key}={json.dumps(value)}" for key, value in names.items()]
            return load_config("llama", overrides)
        if request.param == "section":
            return load_config(write(tmp_path / "a.yaml", {"extends": "llama", "model": names}))
        preset = {"preset": "gpt2"} if "preset" in request.param else {}
        return load_config(write(tmp_path / "a.yaml", {**names, **preset}), rewrite=sections)

    return call


@pytest.mark.parametrize(("theirs", "value", "ours", "expected", "beside"), CASES)
def test_a_name(
    load: Load, theirs: str, value: Any, ours: str, expected: Any, beside: dict[str, Any]
) -> None:
    found: Any = load({theirs: value, **beside}).model
    for part in ours.split("."):
        found = getattr(found, part)
    assert getattr(found, "name", found) == expected


@pytest.mark.parametrize("attention", sorted(NAMES["attention"]))
@pytest.mark.parametrize("ffn", ["ff_standard", "ff_swiglu", "ff_moe"])
def test_a_whole_model(load: Load, attention: str, ffn: str) -> None:
    names = {
        **{"attention_type": attention, "ffn_type": ffn, "norm_type": "layernorm"},
        **{"pos_type": "learned_absolute", "n_embd": 64, "num_heads": 8, "n_layers": 2},
        **{"block_size": 32, "activation": "gelu", "vocab_size": 300, "dropout": 0.1},
        **({"window": 16} if "window" in attention else {}),
    }
    config = load(names)
    model = config.model
    assert (model.d_model, model.n_heads, model.n_kv_heads, model.n_layers) == (64, 8, 8, 2)
    assert (model.max_seq_len, config.pretrain.training.seq_len) == (32, 32)
    assert (model.norm.name, model.position.name, model.dropout) == ("layernorm", "learned", 0.1)
    assert (model.moe is not None) == (ffn == "ff_moe")


def test_a_choice_does_not_inherit_what_belonged_to_another(tmp_path: Path) -> None:
    """In whatever order a line has them."""
    for line in (["model.activation=relu", "model.ffn=standard"],
                 ["model.ffn_type=ff_standard", "model.activation=relu"]):  # fmt: skip
        assert load_config("gpt2", line).model.activation == "relu"
    assert load_config("gpt2", ["model.ffn=standard"]).model.activation == "gelu"
    assert load_config("custom").model.window == 128
    assert load_config("custom", ["model.attention=flash_attention"]).model.window is None
    kept = load_config("custom", ["model.window=64", "model.attention=window"]).model
    assert (kept.window, kept.window_pattern) == (64, "SSSL")


def test_heads_of_keys_follow_the_heads_where_none_are_stated() -> None:
    assert load_config("gpt2", ["model.n_heads=8"]).model.n_kv_heads == 8
    assert load_config("gpt2-full", ["model.n_heads=8"]).model.n_kv_heads == 8
    assert load_config("local-smoke", ["model.n_kv_heads=null"]).model.n_kv_heads == 4
    assert load_config("local-smoke", ["model.n_heads=8"]).model.n_kv_heads == 2


def test_a_pair_fits_the_context() -> None:
    dpo = load_config("local-smoke", ["model.max_seq_len=64"]).dpo
    assert (dpo.max_prompt_tokens, dpo.max_answer_tokens) == (32, 16)
    assert dpo.training.seq_len == 32 + 2 * 16

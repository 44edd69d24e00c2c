"""Choices of components in a config: names of other projects, width rules, what excludes what."""

from typing import Any

import pytest
from pydantic import ValidationError

from modern_llm.config import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 61, "d_model": 96, "n_layers": 2, "n_heads": 6, "max_seq_len": 32,
}  # fmt: skip


def make(**fields: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"attention_type": "flash_attention"}, "attention", "full"),
        ({"attention_type": "local_window_attention", "window": 4}, "attention", "window"),
        ({"attention": "linear_attention"}, "attention", "linear"),
        ({"ffn_type": "ff_geglu"}, "ffn.name", "geglu"),
        ({"ffn": {"name": "ff_relu2"}}, "ffn.name", "relu2"),
        ({"ffn_type": "ff_moe"}, "moe.n_experts", 8),
        ({"ffn": {"name": "moe", "n_experts": 4, "top_k": 1}}, "moe.n_experts", 4),
        ({"ffn": {"name": "moe", "n_experts": 4, "top_k": 1}}, "moe.top_k", 1),
        ({"ffn": {"name": "moe", "expert": "relu2"}}, "ffn.name", "relu2"),
        ({"ffn": "moe", "moe": {"n_experts": 3}}, "moe.n_experts", 3),
    ],
)
def test_names_of_other_projects(given: dict[str, Any], field: str, expected: object) -> None:
    value: Any = make(**given)
    for part in field.split("."):
        value = getattr(value, part)
    assert value == expected


@pytest.mark.parametrize(
    ("given", "matrices_times_width"),
    [
        ({"ffn": "standard", "d_ff": "4x"}, 2 * 384),
        ({"ffn": "swiglu", "d_ff": "8/3"}, 3 * 256),
        ({"ffn": "swiglu"}, 3 * 256),
        ({"ffn": "relu2"}, 2 * 384),
        ({"ffn": "geglu", "d_ff": "equal_params"}, 3 * 256),
        ({"ffn": "standard", "d_ff": "equal_params"}, 2 * 384),
        ({"ffn": "moe", "d_ff": "equal_params"}, 3 * 32),  # an eighth of each of 8 experts
        ({"ffn": "moe", "d_ff": "equal_flops"}, 3 * 128),  # two of them are used
        ({"ffn": {"name": "moe", "top_k": 1}, "d_ff": "equal_flops"}, 3 * 256),
    ],
)
def test_width_rules(given: dict[str, Any], matrices_times_width: int) -> None:
    """All equal the 8 D^2 parameters of a standard feed-forward, counted as the rule says."""
    config = make(**given)
    matrices = 2 if config.ffn.name in ("standard", "relu2") else 3
    assert config.d_ff * matrices == matrices_times_width


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"d_ff": "9x"}, "neither a width nor a rule (4x, 8/3, equal_params, equal_flops)"),
        ({"window_pattern": "SL"}, "need attention=window"),
        ({"attention": "linear", "window": 4}, "need attention=window"),
        ({"attention": "linear", "sink": "learned"}, "leave out sink"),
        (
            {"attention": "linear", "softcap": 2.0, "attention_backend": "sdpa"},
            "leave out softcap, attention_backend",
        ),
        ({"attention": "window", "window": 4, "window_pattern": "SX"}, "window_pattern"),
        ({"ffn": "relu2", "activation": "silu"}, "activation=silu has no effect with ffn=relu2"),
        ({"softcap": 0.0}, "greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(**given)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "2L-6H-96D-RoPE-RMS-SwiGLU-PreNorm"),
        (
            {"norm": "layernorm", "position": "learned", "ffn": "standard", "n_kv_heads": 2},
            "2L-6H2KV-96D-Learned-LN-GELU-PreNorm",
        ),
        (
            {"attention": "window", "window": 8, "window_pattern": "SSSL", "qk_norm": True},
            "2L-6H-96D-RoPE-RMS-SwiGLU-PreNorm-Window8SSSL-QKNorm",
        ),
        (
            {"attention": "linear", "ffn": "moe", "norm_position": "post"},
            "2L-6H-96D-RoPE-RMS-SwiGLUx8-PostNorm-Linear",
        ),
        (
            {"norm": "mine", "sink": "learned", "softcap": 3.0, "position": "alibi"},
            "2L-6H-96D-ALiBi-mine-SwiGLU-PreNorm-Sink-Cap",
        ),
    ],
)
def test_short_names(given: dict[str, Any], expected: str) -> None:
    assert make(**given).short_name == expected

"""Our weights under the names and layouts of transformers: Llama and GPT-2 shapes.

A config that neither shape can express exactly is refused with the fields that stand in the way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models import ACTIVATIONS, FFNS, NORMS, POSITIONS

Weights = dict[str, Tensor]
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


@dataclass(frozen=True)
class Shape:
    """One architecture of transformers.

    Attributes:
        architecture: its class.
        obstacles: fields of a config that it cannot express, each with the reason.
        config: ``config.json`` without the special ids.
        weights: our tensors under its names.
    """

    architecture: str
    obstacles: Callable[[ModelConfig], list[str]]
    config: Callable[[ModelConfig], dict[str, Any]]
    weights: Callable[[ModelConfig, Mapping[str, Tensor]], Weights]


def shape_of(config: ModelConfig) -> Shape:
    """The shape that expresses ``config`` exactly.

    Raises:
        ConfigError: none does; names the fields that stand in the way of each.
    """
    found = {shape.architecture: shape.obstacles(config) for shape in SHAPES}
    for shape in SHAPES:
        if not found[shape.architecture]:
            return shape
    nearest = min(found, key=lambda name: len(found[name]))
    others = "; ".join(f"{n}: {', '.join(o)}" for n, o in found.items() if n != nearest)
    raise ConfigError(
        f"no transformers architecture has this model's parts; in the way of {nearest}: "
        f"{', '.join(found[nearest])} ({others})"
    )


def _common_obstacles(config: ModelConfig) -> list[str]:
    problems = []
    if config.norm_position != "pre":
        problems.append(f"model.norm_position={config.norm_position} (needs pre)")
    if config.attention != "full":
        problems.append(f"model.attention={config.attention} (needs full)")
    if config.sink != "none":
        problems.append(f"model.sink={config.sink} (needs none)")
    if config.softcap is not None:
        problems.append(f"model.softcap={config.softcap} (needs null)")
    if config.moe is not None:
        problems.append("model.moe (needs null)")
    if config.qk_norm:
        problems.append("model.qk_norm=true (needs false)")
    return problems


def _wrong_parts(config: ModelConfig, *, norm: str, position: str, ffn: str) -> list[str]:
    wanted = (
        ("norm", NORMS.resolve(config.norm.name), norm),
        ("position", POSITIONS.resolve(config.position.name), position),
        ("ffn", FFNS.resolve(config.ffn.name), ffn),
    )
    return [f"model.{name}={is_} (needs {need})" for name, is_, need in wanted if is_ != need]


def _options(config: ModelConfig, known: Mapping[str, set[str]]) -> list[str]:
    """Component options that the shape has no place for."""
    return [
        f"model.{name}.{option} (has no place there)"
        for name, accepted in known.items()
        for option in getattr(config, name).options
        if option not in accepted
    ]


def _llama_obstacles(config: ModelConfig) -> list[str]:
    parts = _wrong_parts(config, norm="rmsnorm", position="rope", ffn="swiglu")
    known = {"norm": set[str](), "position": {"theta"}, "ffn": set[str]()}
    return parts + _common_obstacles(config) + ([] if parts else _options(config, known))


def _llama_config(config: ModelConfig) -> dict[str, Any]:
    theta = float(config.position.options.get("theta", 10_000.0))
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # and by 5
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _llama_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> Weights:
    queries, keys = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    renamed: Weights = {
        "model.embed_tokens.weight": weights["embedding.weight"],
        "model.norm.weight": weights["final_norm.weight"],
    }
    if not config.tie_embeddings:
        renamed["lm_head.weight"] = weights["head.weight"]
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        renamed[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.attention_norm.weight"]
        renamed[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.ffn_norm.weight"]
        for kind in ("weight", "bias") if config.bias else ("weight",):
            qkv = torch.split(weights[f"{ours}.attention.qkv.{kind}"], [queries, keys, keys])
            for name, part in zip("qkv", qkv, strict=True):
                renamed[f"{theirs}.self_attn.{name}_proj.{kind}"] = part
            renamed[f"{theirs}.self_attn.o_proj.{kind}"] = weights[f"{ours}.attention.out.{kind}"]
            gate, up = weights[f"{ours}.ffn.gate_up.{kind}"].chunk(2)
            renamed[f"{theirs}.mlp.gate_proj.{kind}"] = gate
            renamed[f"{theirs}.mlp.up_proj.{kind}"] = up
            renamed[f"{theirs}.mlp.down_proj.{kind}"] = weights[f"{ours}.ffn.down.{kind}"]
    return renamed


def _gpt2_obstacles(config: ModelConfig) -> list[str]:
    parts = _wrong_parts(config, norm="layernorm", position="learned", ffn="standard")
    activation = ACTIVATIONS.resolve(config.activation)
    if activation not in GPT2_ACTIVATIONS and not parts:
        parts.append(f"model.activation={activation} (needs {' or '.join(GPT2_ACTIVATIONS)})")
    if config.n_kv_heads != config.n_heads:
        parts.append(f"model.n_kv_heads={config.n_kv_heads} (needs n_heads={config.n_heads})")
    known = {"norm": set[str](), "position": set[str](), "ffn": set[str]()}
    return parts + _common_obstacles(config) + ([] if parts else _options(config, known))


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.max_seq_len,
        "activation_function": GPT2_ACTIVATIONS[ACTIVATIONS.resolve(config.activation)],
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _gpt2_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> Weights:
    """GPT-2 keeps its matrices transposed, and has biases: ours are zero where we have none."""
    renamed: Weights = {
        "transformer.wte.weight": weights["embedding.weight"],
        "transformer.wpe.weight": weights["position.table.weight"],
    }
    if not config.tie_embeddings:
        renamed["lm_head.weight"] = weights["head.weight"]

    def place(theirs: str, ours: str, *, transposed: bool = False) -> None:
        weight = weights[f"{ours}.weight"]
        renamed[f"{theirs}.weight"] = weight.t() if transposed else weight
        zero = torch.zeros(weight.shape[0], dtype=weight.dtype)
        renamed[f"{theirs}.bias"] = weights.get(f"{ours}.bias", zero)

    place("transformer.ln_f", "final_norm")
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        place(f"{theirs}.ln_1", f"{ours}.attention_norm")
        place(f"{theirs}.ln_2", f"{ours}.ffn_norm")
        place(f"{theirs}.attn.c_attn", f"{ours}.attention.qkv", transposed=True)
        place(f"{theirs}.attn.c_proj", f"{ours}.attention.out", transposed=True)
        place(f"{theirs}.mlp.c_fc", f"{ours}.ffn.up", transposed=True)
        place(f"{theirs}.mlp.c_proj", f"{ours}.ffn.down", transposed=True)
    return renamed


SHAPES = (
    Shape("LlamaForCausalLM", _llama_obstacles, _llama_config, _llama_weights),
    Shape("GPT2LMHeadModel", _gpt2_obstacles, _gpt2_config, _gpt2_weights),
)

"""Logits of the same weights in transformers' models of the same shape, float32."""

import pytest
import torch
from torch import Tensor

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        gain = parameter.dim() == 1
        torch.nn.init.normal_(parameter, mean=float(gain), std=0.2)
    return model.eval()


def compare(ours: ModernDecoderLM, weights: dict[str, Tensor], theirs: torch.nn.Module) -> None:
    ours.load_weights(weights)
    with torch.no_grad():
        actual, expected = ours.eval()(TOKENS), theirs(TOKENS).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def llama_block(state: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
    qkv = [state[f"{theirs}self_attn.{n}_proj.weight"] for n in "qkv"]
    return {
        f"{ours}attention_norm.weight": state[f"{theirs}input_layernorm.weight"],
        f"{ours}attention.qkv.weight": torch.cat(qkv),
        f"{ours}attention.out.weight": state[f"{theirs}self_attn.o_proj.weight"],
        f"{ours}ffn_norm.weight": state[f"{theirs}post_attention_layernorm.weight"],
    }


def llama_ends(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "embedding.weight": state["model.embed_tokens.weight"],
        "final_norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }


def llama_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = llama_ends(state)
    for i in range(3):
        weights |= llama_block(state, i)
        mlp = f"model.layers.{i}.mlp."
        gate_up = [state[f"{mlp}{n}_proj.weight"] for n in ("gate", "up")]
        weights[f"blocks.{i}.ffn.gate_up.weight"] = torch.cat(gate_up)
        weights[f"blocks.{i}.ffn.down.weight"] = state[f"{mlp}down_proj.weight"]
    return weights


SIZES = dict(vocab_size=61, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=80)
LLAMA = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_llama(backend: str, theta: float) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    theirs = randomise(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_parameters=rope))
    )
    weights = llama_weights(theirs.state_dict())
    config = ModelConfig(
        **SIZES,
        max_seq_len=32,
        tie_embeddings=False,
        attention_backend=backend,
        position={"name": "rope", "theta": theta},
    )
    compare(ModernDecoderLM(config), weights, theirs)


def test_mixtral() -> None:
    theirs = randomise(
        transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=7
            )
        )
    )
    state = theirs.state_dict()
    weights = llama_ends(state)
    for i in range(3):
        weights |= llama_block(state, i)
        theirs_moe, ours_moe = f"model.layers.{i}.mlp.", f"blocks.{i}.moe."
        weights[f"{ours_moe}router.weight"] = state[f"{theirs_moe}gate.weight"]
        gate_up = state[f"{theirs_moe}experts.gate_up_proj"]
        weights[f"{ours_moe}experts.gate_up.weight"] = gate_up
        weights[f"{ours_moe}experts.down.weight"] = state[f"{theirs_moe}experts.down_proj"]
    config = ModelConfig(
        **SIZES,
        max_seq_len=32,
        tie_embeddings=False,
        attention="window",
        window=7,
        moe={"n_experts": 4, "top_k": 2},
        position={"name": "rope", "theta": theirs.config.rope_parameters["rope_theta"]},
    )
    compare(ModernDecoderLM(config), weights, theirs)


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
def test_gpt2(backend: str) -> None:
    theirs = randomise(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_embd=48, n_layer=3, n_head=6, n_positions=32)
        )
    )
    state = theirs.state_dict()
    weights = {
        "embedding.weight": state["transformer.wte.weight"],
        "position.table.weight": state["transformer.wpe.weight"],
        "final_norm.weight": state["transformer.ln_f.weight"],
        "final_norm.bias": state["transformer.ln_f.bias"],
    }
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn.up": "mlp.c_fc",
        "ffn.down": "mlp.c_proj",
    }
    for i in range(3):
        for ours, name in parts.items():
            weight = state[f"transformer.h.{i}.{name}.weight"]  # a Conv1D holds in x out
            weights[f"blocks.{i}.{ours}.weight"] = weight.T if weight.dim() == 2 else weight
            weights[f"blocks.{i}.{ours}.bias"] = state[f"transformer.h.{i}.{name}.bias"]
    config = ModelConfig(
        vocab_size=61,
        d_model=48,
        n_layers=3,
        n_heads=6,
        max_seq_len=32,
        norm="layernorm",
        position="learned",
        ffn="standard",
        activation="gelu_tanh",
        bias=True,
        attention_backend=backend,
    )
    compare(ModernDecoderLM(config), weights, theirs)


def test_mistral() -> None:
    """Sliding windows, and more text than a window holds."""
    theirs = randomise(
        transformers.MistralForCausalLM(
            transformers.MistralConfig(
                **LLAMA, head_dim=8, sliding_window=7, attn_implementation="eager"
            )
        )
    )
    weights = llama_weights(theirs.state_dict())
    config = ModelConfig(
        **SIZES,
        max_seq_len=32,
        tie_embeddings=False,
        attention="window",
        window=7,
        position={"name": "rope", "theta": theirs.config.rope_parameters["rope_theta"]},
    )
    compare(ModernDecoderLM(config), weights, theirs)


def gpt_oss_block(state: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Our names for layer ``i``; a unit is added to its linear units' bias, as gpt-oss adds it."""
    theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
    experts, moe = f"{theirs}mlp.experts.", f"{ours}moe.experts."
    gate_up, bias = state[f"{experts}gate_up_proj"], state[f"{experts}gate_up_proj_bias"]
    up_bias = bias[:, 1::2] + 1
    return llama_block(state, i) | {
        f"{ours}attention.qkv.bias": torch.cat(
            [state[f"{theirs}self_attn.{n}_proj.bias"] for n in "qkv"]
        ),
        f"{ours}attention.out.bias": state[f"{theirs}self_attn.o_proj.bias"],
        f"{ours}attention.sink_N": state[f"{theirs}self_attn.sinks"],
        f"{ours}moe.router.weight": state[f"{theirs}mlp.router.weight"],
        f"{moe}gate_up.weight": torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], -1).mT,
        f"{moe}gate_up.bias": torch.cat([bias[:, ::2], up_bias], -1),
        f"{moe}down.weight": state[f"{experts}down_proj"].mT,
        f"{moe}down.bias": state[f"{experts}down_proj_bias"],
    }


def test_gpt_oss() -> None:
    """Learned sinks, biases, experts, and windows in every other layer."""
    settings = LLAMA | {"num_hidden_layers": 2, "head_dim": 8, "num_local_experts": 4}
    theirs = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **settings,
            num_experts_per_tok=2,
            sliding_window=7,
            swiglu_limit=1e9,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            attn_implementation="eager",
        )
    )
    randomise(theirs)
    for layer in theirs.model.layers:
        layer.mlp.experts.alpha = 1.0  # the plain SiLU
        torch.nn.init.zeros_(layer.mlp.router.bias)
    state = theirs.state_dict()
    weights = llama_ends(state) | gpt_oss_block(state, 0) | gpt_oss_block(state, 1)
    config = ModelConfig(
        **SIZES | {"n_layers": 2},
        max_seq_len=32,
        tie_embeddings=False,
        bias=True,
        attention="window",
        window=7,
        window_pattern="SL",
        sink="learned",
        moe={"n_experts": 4, "top_k": 2},
    )
    compare(ModernDecoderLM(config), weights, theirs)

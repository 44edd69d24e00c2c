"""Costs against torch.utils.flop_counter."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modern_llm.config import ModelConfig, get_pipeline_preset, list_presets
from modern_llm.models import FFNS, KERNELS, NORMS, POSITIONS, ModernDecoderLM, VerifierModel
from modern_llm.models.attention import ATTENTIONS
from modern_llm.models.ffn import ACTIVATIONS

COUNTED = sorted(set(KERNELS) - {"flex"})  # the counter does not know that one

VARIANTS = [
    *({"norm": name} for name in NORMS),
    *({"position": name} for name in POSITIONS),
    *({"ffn": name, "bias": True} for name in FFNS),
    *({"ffn": "standard", "activation": name} for name in ACTIVATIONS),
    *({"ffn": name, "moe": {"n_experts": 4, "top_k": 2}} for name in FFNS),
    {"moe": {"n_experts": 3, "top_k": 1, "every": 2}},
    {"n_kv_heads": 1, "qk_norm": True},
    {"sink": "learned", "n_kv_heads": 2},
    {"tie_embeddings": False, "norm_position": "post"},
    {"attention": "window", "window": 8, "n_sinks": 2},
    {"attention": "window", "window": 8, "window_pattern": "SL"},
    {"attention": "window", "window": 8, "sink": "learned", "n_kv_heads": 1},
]
LINEAR = [
    {"attention": "linear", "n_kv_heads": heads, "max_seq_len": length}
    for heads in (1, 4)
    for length in (48, 100)
] + [
    {"attention": "linear", "position": name}
    for name in POSITIONS
    if name != "alibi"  # it adds to logits, which linear attention has not
]


def counted(model: torch.nn.Module, rows: int, length: int) -> tuple[float, float]:
    """FLOPs of forward, and of forward and backward, per token.

    With the math kernel: the counter does not know the fused one of the CPU.
    """
    tokens = torch.randint(0, 32, (rows, length))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(tokens)
        with FlopCounterMode(display=False) as both:
            out = model(tokens)
            sum(x.float().sum() for x in (out if isinstance(out, tuple) else [out])).backward()
    tokens_read = rows * length
    return forward.get_total_flops() / tokens_read, both.get_total_flops() / tokens_read


@pytest.mark.parametrize(
    ("variant", "kernel"),
    [
        *itertools.product(VARIANTS, COUNTED),
        *((variant, "auto") for variant in LINEAR),
    ],
    ids=str,
)
def test_flops_and_parameters(variant: dict, kernel: str) -> None:
    config = ModelConfig(
        **{
            "vocab_size": 97,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 48,
            "attention_backend": kernel,
            **variant,
        }
    )
    model, length = ModernDecoderLM(config), config.max_seq_len
    cost = model.cost(length)
    forward, both = counted(model, 2, length)
    assert cost.flops_per_token_forward == pytest.approx(forward, rel=0.01)
    assert cost.flops_per_token_training == pytest.approx(both, rel=0.01)
    assert sum(cost.parts.values()) == pytest.approx(cost.flops_per_token_forward)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert (cost.active_params < cost.params) is ("moe" in variant)


def test_experts_are_active_in_their_share() -> None:
    sizes = dict(vocab_size=9, d_model=16, n_layers=1, n_heads=2, d_ff=32, max_seq_len=8)
    dense = ModernDecoderLM(ModelConfig(**sizes)).cost(8)
    experts = 3 * 16 * 32  # three matrices each
    mixture = ModernDecoderLM(ModelConfig(**sizes, moe={"n_experts": 8, "top_k": 2})).cost(8)
    assert mixture.params == dense.params + 7 * experts + 16 * 8
    assert mixture.active_params == dense.active_params + experts + 16 * 8
    assert dense.embedding_params == 9 * 16


def test_verifier_adds_its_head() -> None:
    config = ModelConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4, max_seq_len=48)
    model = VerifierModel(config)

    class OnAnswers(torch.nn.Module):
        """The verifier on rows that are solutions after their first token."""

        def forward(self, tokens: torch.Tensor) -> object:
            return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens) > 0)

    forward, both = counted(OnAnswers(), 2, 33)  # 64 answers, no row of padding
    assert model.cost(33).flops_per_token_forward == pytest.approx(forward, rel=0.01)
    assert model.cost(33).flops_per_token_training == pytest.approx(both, rel=0.01)


def test_gpt2_small_is_as_published() -> None:
    """124.4 M parameters, and 0.86 GFLOPs a trained token at 1024 tokens."""
    config = ModelConfig(
        vocab_size=50257,
        d_model=768,
        n_layers=12,
        n_heads=12,
        max_seq_len=1024,
        norm="layernorm",
        position="learned",
        ffn="standard",
        activation="gelu_tanh",
        bias=True,
    )
    with torch.device("meta"):
        cost = ModernDecoderLM(config).cost(1024)
    assert cost.params == 124_439_808
    assert cost.flops_per_token_training == pytest.approx(0.86e9, rel=0.01)


def test_every_kind_of_attention_is_among_the_variants() -> None:
    assert {v.get("attention", "full") for v in [*VARIANTS, *LINEAR]} == set(ATTENTIONS)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"n_kv_heads": 2, "ffn": "standard"},
        {"attention": "linear"},
        {"moe": {"n_experts": 4, "top_k": 2}, "tie_embeddings": False},
    ],
    ids=str,
)
def test_each_part_has_its_share(variant: dict) -> None:
    """Attention, feed-forward and head apart, as the counter finds them by module."""
    sizes = {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 48}
    config = ModelConfig(**sizes, **variant)
    model = ModernDecoderLM(config)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(torch.zeros(1, 48, dtype=torch.long))
    by_module = {name: sum(ops.values()) / 48 for name, ops in counter.get_flop_counts().items()}
    blocks = [f"ModernDecoderLM.blocks.{layer}" for layer in range(2)]
    ffn = "moe" if config.moe else "ffn"
    cost = model.cost(48)
    assert cost.attention_flops == pytest.approx(sum(by_module[f"{b}.attention"] for b in blocks))
    assert cost.feed_forward_flops == pytest.approx(sum(by_module[f"{b}.{ffn}"] for b in blocks))
    inside = sum(by_module[block] for block in blocks)
    assert cost.head_flops == pytest.approx(by_module["Global"] - inside)
    parts = cost.attention_flops + cost.feed_forward_flops + cost.head_flops
    assert parts == pytest.approx(cost.flops_per_token_forward)


@pytest.mark.parametrize("kernel", COUNTED)
@pytest.mark.parametrize("preset", list_presets())
def test_every_preset(preset: str, kernel: str) -> None:
    """On the meta device, where nothing is computed but all products are counted."""
    config = get_pipeline_preset(preset).model
    config = config.model_copy(update={"attention_backend": kernel})
    length = config.max_seq_len
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = ModernDecoderLM(config)
        with FlopCounterMode(display=False) as forward:
            logits = model(torch.zeros(1, length, dtype=torch.long))
        with FlopCounterMode(display=False) as backward:
            logits.float().sum().backward()
    counts = [counter.get_total_flops() / length for counter in (forward, backward)]
    cost = model.cost(length)
    assert cost.flops_per_token_forward == pytest.approx(counts[0], rel=0.01)
    assert cost.flops_per_token_training == pytest.approx(sum(counts), rel=0.01)
    assert cost.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("position", ["alibi", "rope"])
def test_a_bias_keeps_the_future_in_the_products(position: str) -> None:
    """Longer than a block of `blocks`, which leaves the future out where no bias is added."""
    config = ModelConfig(
        vocab_size=32, d_model=32, n_layers=1, n_heads=2, max_seq_len=700, position=position,
        attention_backend="blocks",
    )  # fmt: skip
    model = ModernDecoderLM(config)
    forward, _ = counted(model, 1, 700)
    assert model.cost(700).flops_per_token_forward == pytest.approx(forward, rel=0.01)

"""Every legal combination of components builds, learns and decodes as it reads; others say why."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models import ACTIVATIONS, FFNS, NORMS, POSITIONS, ModernDecoderLM

ATTENTION = {
    "full": {},
    "window": {"attention": "window", "window": 3},
    "window, some layers": {"attention": "window", "window": 3, "window_pattern": "SL"},
    "streaming sinks": {"attention": "window", "window": 3, "n_sinks": 2},
    "linear": {"attention": "linear"},
}
EXTRAS = {
    "plain": {},
    "learned sink": {"sink": "learned"},
    "soft cap": {"softcap": 5.0},
    "grouped, normed, biased, untied": {
        "n_kv_heads": 2, "qk_norm": True, "bias": True, "tie_embeddings": False,
    },
}  # fmt: skip
FEED_FORWARD = {
    **{name: {"ffn": name} for name in FFNS},
    **{f"standard {name}": {"ffn": "standard", "activation": name} for name in ACTIVATIONS},
    **{f"{name} x3": {"ffn": name, "moe": {"n_experts": 3}} for name in FFNS},
}
TOKENS = torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(0))


def refusal(position: str, attention: str, extra: str) -> str | None:
    """What the refusal of a combination says, or None where it is legal."""
    if attention == "linear" and extra in ("learned sink", "soft cap"):
        return "attention=linear has no softmax"
    if attention == "linear" and position == "alibi":
        return "attention=linear has no logits"
    return None


def build(position: str, attention: str, extra: str, **changes: object) -> ModernDecoderLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, d_model=16, n_layers=2, n_heads=4, d_ff=16, max_seq_len=9)
    fields = {**ATTENTION[attention], **EXTRAS[extra], **changes}
    return ModernDecoderLM(
        ModelConfig(**{**sizes, "init_std": 0.2, "position": position, **fields})
    )


def learns(model: ModernDecoderLM) -> None:
    """A step of AdamW in float32 and one in bfloat16, which finds the loss lower, on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            logits = model(TOKENS[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + (model.aux_loss() or 0.0)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def decodes(model: ModernDecoderLM) -> None:
    """With its cache, in parts, as in one forward."""
    model.eval().requires_grad_(False)
    cache = model.new_cache(2, 9)
    parts = [model(TOKENS[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 8), (8, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), model(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("position", sorted(POSITIONS))
def test_every_combination(position: str, attention: str, extra: str) -> None:
    """With each norm, in both places, and each feed-forward."""
    told = refusal(position, attention, extra)
    if told is not None:
        with pytest.raises((ConfigError, ValueError), match=told):
            build(position, attention, extra)
        return
    for norm, place, ffn in itertools.product(NORMS, ("pre", "post"), FEED_FORWARD):
        changes = {"norm": norm, "norm_position": place, **FEED_FORWARD[ffn]}
        model = build(position, attention, extra, **changes)
        learns(model)
        decodes(model)

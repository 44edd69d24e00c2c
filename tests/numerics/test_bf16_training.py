"""Training in bfloat16 follows training in float32 within rounding, step by step."""

import pytest
import torch

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.models import ModernDecoderLM
from modern_llm.training.objectives import LMObjective
from modern_llm.training.update import Update

N_STEPS = 40


def losses(precision: str, backend: str) -> torch.Tensor:
    """Loss of each step on text of a fixed chain of tokens, from the same weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=48, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64,
        attention_backend=backend,
    )  # fmt: skip
    training = TrainingConfig(
        max_steps=N_STEPS, batch_size=8, seq_len=64, lr=3e-3, precision=precision, device="cpu"
    )
    model = ModernDecoderLM(config)
    update = Update(model, LMObjective(), training, device=torch.device("cpu"))
    assert all(p.dtype is torch.float32 for p in model.parameters())
    follower = torch.randint(0, 48, (48, 2), generator=torch.Generator().manual_seed(1))
    curve = []
    for step in range(N_STEPS):
        rng = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 48, (8, 65), generator=rng)
        coin = torch.randint(0, 2, (8, 65), generator=rng)
        for t in range(1, 65):
            tokens[:, t] = follower[tokens[:, t - 1], coin[:, t]]
        batch = TokenBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)
        curve.append(update([batch], step=step).loss)
    return torch.tensor(curve)


@pytest.mark.parametrize("backend", ["auto", "blocks", "sdpa"])
def test_bf16_curve_is_the_fp32_curve(backend: str) -> None:
    exact, rounded = losses("fp32", "sdpa"), losses("bf16", backend)
    assert exact[0] - exact[-1] > 1.0  # it learns
    assert (rounded - exact).abs().max() < 0.05
    assert (rounded - exact).mean().abs() < 0.01  # and no drift to one side

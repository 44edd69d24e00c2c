"""State, buffers and peaks by engine, against storages and the allocator's own account."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.models import ModernDecoderLM
from modern_llm.models.memory import Pass, activations
from modern_llm.training.memory import Share, State

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(vocab_size=101, d_model=32, n_layers=3, n_heads=4, max_seq_len=16)


def training(**options: Any) -> TrainingConfig:
    return TrainingConfig(max_steps=1, batch_size=1, seq_len=16, **options)


def state(model: dict | None = None, **options: Any) -> State:
    return State(ModelConfig(**{**TINY, **(model or {})}), training(**options))


def measured(*flags: str) -> list[list[Any]]:
    """Rows of the benchmark: what, predicted and measured bytes."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--json", *flags],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    (rows,) = json.loads(done.stdout.splitlines()[-1]).values()
    return list(rows)


def check(rows: list[list[Any]]) -> None:
    """State within 5 %, what a step takes within 20 %."""
    for what, predicted, found in rows:
        for part in ("parameters", "gradients", "optimizer"):
            assert predicted[part] == pytest.approx(found[part], rel=0.05), (what, part)
        assert predicted["peak"] == pytest.approx(found["peak"], rel=0.2), what


def test_one_process() -> None:
    rows = measured("--engines", "none", "--only", "bytes")
    assert len(rows) == 2 * 2
    check(rows)


@pytest.mark.slow
def test_one_process_of_every_kind() -> None:
    rows = measured("--engines", "none", "--only", "gpt2", "llama", "moe", "window")
    assert len(rows) == 4 * 2 * 2
    check(rows)


@pytest.mark.slow
def test_two_ranks() -> None:
    rows = measured("--engines", "ranks", "--only", "bytes")
    assert len(rows) == 4 * 2 * 2
    check(rows)


def test_sixteen_bytes_a_parameter() -> None:
    plain = state()
    count = sum(p.numel() for p in ModernDecoderLM(ModelConfig(**TINY)).parameters())
    assert plain.parameters == count
    assert plain.on_rank(Share("none")) == (4 * count, 4 * count, 8 * count)
    assert plain.on_rank(Share("ddp", gpus=4)) == plain.on_rank(Share("none"))
    assert (plain.weights_bytes(), plain.checkpoint_bytes()) == (4 * count, 12 * count)


def test_muon_has_one_moment_for_hidden_matrices() -> None:
    model = ModernDecoderLM(ModelConfig(**TINY))
    hidden = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    adamw, muon = state(), state(optimizer="muon")
    assert adamw.moments - muon.moments == 4 * hidden


def test_fsdp_shares_rows_and_rounds_up() -> None:
    """101 rows of the embedding over 8 ranks are 13 on the first; 4 experts leave ranks empty."""
    expected = 0
    for p in ModernDecoderLM(ModelConfig(**TINY)).parameters():
        expected += 4 * len(p.chunk(8)[0]) * p[0].numel()
    own, gradients, moments = state().on_rank(Share("fsdp", "full", 8))
    assert own == gradients == pytest.approx(expected)
    assert moments == pytest.approx(2 * expected)
    experts = {"moe": {"n_experts": 4, "top_k": 1}}
    few, many = (state(experts).on_rank(Share("fsdp", "full", n))[0] for n in (4, 16))
    assert many > few / 2  # an expert is never cut


def test_hybrid_shares_within_a_node() -> None:
    over_nodes = state().on_rank(Share("fsdp", "hybrid", 32, per_node=8))
    assert over_nodes == state().on_rank(Share("fsdp", "full", 8))


def test_zero1_gives_whole_parameters_to_the_rank_with_the_fewest() -> None:
    """The largest share is that of torch's own rule, or one parameter's if that is larger."""
    torch.manual_seed(0)
    sizes = sorted(p.numel() for p in ModernDecoderLM(ModelConfig(**TINY)).parameters())[::-1]
    for ranks in (2, 3, 7):
        loads = [0] * ranks
        for size in sizes:
            loads[loads.index(min(loads))] += size
        assert state().on_rank(Share("zero1", gpus=ranks))[2] == 8 * max(loads)
    many = state().on_rank(Share("zero1", gpus=500))[2]
    assert many == 8 * sizes[0]


def test_building_a_plan_takes_no_memory() -> None:
    """The 8 B of Llama 3, counted in seconds: 8,030,261,248 parameters (its model card)."""
    llama = ModelConfig(
        vocab_size=128256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
        max_seq_len=8192, tie_embeddings=False,
    )  # fmt: skip
    assert State(llama, training()).parameters == 8_030_261_248


def test_a_footprint_is_the_most_expensive_moment() -> None:
    for vocab in (8, 20_000):  # a block's backward, and the loss's
        found = state({"vocab_size": vocab})
        step = activations(ModelConfig(**{**TINY, "vocab_size": vocab}), Pass(8, 16, 2))
        for share in (Share("ddp", gpus=2), Share("fsdp", "full", 2), Share("fsdp", "grad_op", 2)):
            for again in (False, True):
                parts = found.footprint(share, step, number=2, checkpointing=again)
                totals = [
                    sum(found.on_rank(share)) + sum(sizes)
                    + found.buffers(share, moment, number=2, checkpointing=again)
                    for moment, sizes in step.moments(checkpointing=again).items()
                ]  # fmt: skip
                assert parts.total == pytest.approx(max(totals))


def test_the_moments_of_another_optimizer_are_found_by_a_step() -> None:
    """What is not AdamW or Muon needs no rule here."""
    from modern_llm.training.optim import OPTIMIZERS, Optimizers

    @OPTIMIZERS.register("test-sgd")
    def sgd(model: nn.Module, config: TrainingConfig) -> Optimizers:
        return Optimizers(torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9))

    try:
        found = state(optimizer="test-sgd")
        assert found.moments == 4 * found.parameters
    finally:
        del OPTIMIZERS._entries["test-sgd"]

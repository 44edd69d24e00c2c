"""Fifty steps of language modelling against a recorded run.

Record again, with a reason in the commit message: ``python tests/golden/test_golden_lm.py``.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.environment import environment
from modern_llm.training import LMObjective
from modern_llm.training.update import Update

STEPS, VOCAB, SEQ_LEN, ROWS = 50, 48, 16, 8
SAME_CPU, OTHER_CPU = 1e-5, 2e-3  # nats, and share of the gradient norm


def batch(step: int) -> list[TokenBatch]:
    """Arithmetic progressions modulo the vocabulary: something that can be learned."""
    row = torch.arange(step * ROWS, (step + 1) * ROWS)[:, None]
    tokens = (row * 7 + (row % 5 + 1) * torch.arange(SEQ_LEN + 1)) % VOCAB
    return [TokenBatch(t[:, :-1], t[:, 1:]) for t in tokens.split(ROWS // 2)]


def run(optimizer: str) -> list[list[float]]:
    """``[loss, gradient norm]`` of every step."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    model = ModernDecoderLM(ModelConfig(**sizes, max_seq_len=SEQ_LEN))
    config = TrainingConfig(
        max_steps=STEPS, batch_size=ROWS, micro_batch_size=ROWS // 2, seq_len=SEQ_LEN, lr=1e-2,
        warmup=5, optimizer=optimizer, device="cpu",
    )  # fmt: skip
    update = Update(model, LMObjective(), config, device=torch.device("cpu"))
    stats = [update(batch(step), step=step) for step in range(STEPS)]
    return [[s.loss, s.grad_norm] for s in stats]


def golden_path(optimizer: str) -> Path:
    return Path(__file__).with_name(f"lm_{optimizer}.json")


def hardware() -> dict[str, Any]:
    facts = environment()["hardware"]
    return {"cpu": facts["cpu"], "cpu_capability": facts["cpu_capability"]}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fifty_steps_follow_the_recorded_run(optimizer: str) -> None:
    golden = json.loads(golden_path(optimizer).read_text())
    before = torch.get_num_threads()
    torch.set_num_threads(golden["threads"])
    try:
        actual = run(optimizer)
    finally:
        torch.set_num_threads(before)
    same = golden["hardware"] == hardware() and golden["torch"] == torch.__version__
    tolerance = SAME_CPU if same else OTHER_CPU
    losses = [a[0] - e[0] for a, e in zip(actual, golden["steps"], strict=True)]
    norms = [a[1] / e[1] - 1 for a, e in zip(actual, golden["steps"], strict=True)]
    assert max(map(abs, losses)) <= tolerance
    assert abs(sum(losses)) / STEPS <= tolerance / 2  # no drift to one side
    assert max(map(abs, norms)) <= 10 * tolerance
    assert golden["steps"][0][0] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert golden["steps"][-1][0] < 0.7 * golden["steps"][0][0]  # it recorded learning


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("adamw", "muon"):
        record = {
            "torch": torch.__version__,
            "threads": 1,
            "hardware": hardware(),
            "columns": ["loss", "grad_norm"],
            "steps": run(name),
        }
        golden_path(name).write_text(json.dumps(record, indent=1) + "\n")

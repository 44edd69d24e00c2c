"""How fast a decoder generates; no time is asserted, but what is timed is."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.evaluation import speed
from modern_llm.evaluation.speed import measure_speed
from modern_llm.models import ModernDecoderLM, generate

SIZES = {"vocab_size": 61, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}
VARIANTS = [
    {},
    {"position": "learned"},
    {"attention": "linear"},
    {"attention": "window", "window": 8, "n_sinks": 2},
    {"moe": {"n_experts": 4, "top_k": 2}, "dropout": 0.5},
]


def decoder(**changes: Any) -> ModernDecoderLM:
    torch.manual_seed(0)
    return ModernDecoderLM(ModelConfig(**{**SIZES, **changes}))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_told_fits_together(variant: dict) -> None:
    told = measure_speed(
        decoder(**variant), batch_size=3, prompt_tokens=10, new_tokens=6, repeats=2,
        max_seconds=60,
    )  # fmt: skip
    assert (told.batch_size, told.prompt_tokens, told.new_tokens, told.repeats) == (3, 10, 6, 2)
    assert (told.device, told.precision) == ("cpu", "fp32")
    assert told.threads == torch.get_num_threads()
    assert told.prefill_tokens_per_s * told.first_token_s == pytest.approx(30)
    assert told.decode_tokens_per_s * told.token_s == pytest.approx(3)
    assert all(math.isfinite(x) for x in asdict(told).values() if isinstance(x, float))
    assert json.loads(json.dumps(asdict(told))) == asdict(told)


def test_mode_and_random_state_stay() -> None:
    model = decoder(dropout=0.5).train()
    before = torch.get_rng_state()
    measure_speed(model, repeats=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()  # nothing it left is in the way


def test_the_tokens_are_those_of_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It times a prompt that is read once and one token a forward, with a cache."""
    model = decoder()
    fed: list[list[int]] = []
    hidden = model.hidden

    def noted(tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["cache"] is not None
        fed.append(tokens_BT[0].tolist())
        return hidden(tokens_BT, **options)

    monkeypatch.setattr(model, "hidden", noted)
    measure_speed(model, prompt_tokens=7, new_tokens=5, repeats=1, max_seconds=60)
    measured = fed[2:]  # after the warm-up
    monkeypatch.undo()
    (expected,) = generate(model, [measured[0]], max_new_tokens=5, eos_id=None)
    assert len(measured[0]) == 7
    assert [token for (token,) in measured[1:]] == expected.tokens[:4]


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps by a second at each look leaves two tokens of one repeat."""
    ticks = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    told = measure_speed(decoder(), new_tokens=20, repeats=9, max_seconds=1.0)
    assert (told.repeats, told.new_tokens) == (1, 2)
    assert told.token_s == told.first_token_s == 1.0


def test_defaults_fit_into_a_short_context() -> None:
    told = measure_speed(decoder(max_seq_len=speed.MIN_CONTEXT), repeats=1)
    assert (told.prompt_tokens, told.new_tokens) == (1, 2)
    told = measure_speed(decoder(max_seq_len=300), repeats=1, max_seconds=60)
    assert (told.prompt_tokens, told.new_tokens) == (128, 32)


@pytest.mark.parametrize(("prompt", "new"), [(60, 5), (0, 4), (4, 1)])
def test_what_cannot_be_timed_is_refused(prompt: int, new: int) -> None:
    with pytest.raises(ConfigError, match=f"a prompt of {prompt} and {new} new tokens"):
        measure_speed(decoder(), prompt_tokens=prompt, new_tokens=new)

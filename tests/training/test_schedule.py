import math

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.errors import ConfigError
from modern_llm.training import SCHEDULES, Schedule


def schedule(**changes: object) -> Schedule:
    base = {"max_steps": 100, "micro_batch_size": 1, "batch_size": 1, "seq_len": 8}
    return Schedule(TrainingConfig(**{**base, "warmup": 10, "min_lr_ratio": 0.1, **changes}))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_warmup_rises_on_a_line_to_the_peak(name: str) -> None:
    factors = [schedule(schedule=name).factor(step) for step in range(10)]
    assert factors == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_no_factor_leaves_zero_to_one_and_none_rises_after_warmup(name: str) -> None:
    factors = [schedule(schedule=name).factor(step) for step in range(130)]
    assert all(0.1 - 1e-12 <= f <= 1.0 for f in factors[9:])
    assert factors[9:] == sorted(factors[9:], reverse=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1 - 0.9 * p),
        ("cosine", lambda p: 0.1 + 0.9 * math.cos(math.pi * p / 2) ** 2),
        ("wsd", lambda p: 1.0 if p <= 0.8 else 1 - 0.9 * (p - 0.8) / 0.2),
    ],
)
def test_closed_form(name: str, expected: object) -> None:
    run = schedule(schedule=name)
    for step in range(10, 100):
        progress = (step - 10) / 90
        assert run.factor(step) == pytest.approx(expected(progress), abs=1e-12)  # type: ignore[operator]


def test_wsd_decay_share_is_an_option() -> None:
    run = schedule(schedule={"name": "wsd", "decay": 0.5}, warmup=0, min_lr_ratio=0.0)
    assert run.factor(50) == 1.0
    assert run.factor(75) == pytest.approx(0.5)


def test_warmup_as_a_share_and_longer_than_the_run() -> None:
    assert schedule(warmup=0.25).warmup_steps == 25
    assert schedule(warmup=0.0).factor(0) == 1.0
    assert schedule(warmup=1).warmup_steps == 1  # one step, not all of them
    short = schedule(max_steps=4, warmup=10)  # a capped run: warm-up is all that there is
    assert [short.factor(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        schedule(schedule="cosin")
    with pytest.raises(ConfigError, match="unknown option 'decya'"):
        schedule(schedule={"name": "wsd", "decya": 0.1})
    with pytest.raises(ConfigError, match=r"decay=0 must be in \(0, 1\]"):
        schedule(schedule={"name": "wsd", "decay": 0})

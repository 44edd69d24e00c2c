import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.errors import ConfigError, DataError, DivergedError
from modern_llm.models import ModernDecoderLM
from modern_llm.training import FirstLoss, LMObjective, Terms
from modern_llm.training.update import Update

Models = Callable[..., ModernDecoderLM]
Configs = Callable[..., TrainingConfig]
CPU = torch.device("cpu")


def ragged_rows() -> TokenBatch:
    """Eight rows with 8, 5, 0, 1, 0, 0, 3 and 8 supervised tokens."""
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 32, (8, 9), generator=rng)
    labels = tokens[:, 1:].clone()
    for row, n in enumerate((8, 5, 0, 1, 0, 0, 3, 8)):
        labels[row, n:] = -100
    return TokenBatch(tokens[:, :-1], labels)


def split(batch: TokenBatch, rows: int) -> list[TokenBatch]:
    pairs = zip(batch.tokens_BT.split(rows), batch.labels_BT.split(rows), strict=True)
    return [TokenBatch(tokens, labels) for tokens, labels in pairs]


def gradients(model: nn.Module, micro_batches: list[TokenBatch], config: TrainingConfig) -> Any:
    """Gradient at the optimizer, unclipped, before it is dropped; and the step's stats."""
    update = Update(model, LMObjective(), config, device=CPU)
    seen = {}
    for part in update.optimizers.parts:
        part.register_step_pre_hook(
            lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        )
    stats = update(micro_batches, step=0)
    return seen, stats


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_accumulated_gradient_equals_that_of_the_whole_batch(
    make_model: Models, make_config: Configs, rows: int, gather: bool
) -> None:
    config = make_config(max_grad_norm=1e9)
    whole, all_at_once = gradients(make_model(dropout=0.0), split(ragged_rows(), 8), config)
    parts, stats = gradients(make_model(dropout=0.0), split(ragged_rows(), rows), config)
    for name, expected in whole.items():
        error = (parts[name] - expected).norm() / expected.norm()
        assert error < 1e-5, name
    assert stats.units == all_at_once.units == 25
    assert stats.loss == pytest.approx(all_at_once.loss, rel=1e-6)
    assert stats.grad_norm == pytest.approx(all_at_once.grad_norm, rel=1e-5)


def test_gradient_is_that_of_the_mean_over_tokens(make_model: Models, make_config: Configs) -> None:
    actual, stats = gradients(
        make_model(dropout=0.0), split(ragged_rows(), 2), make_config(max_grad_norm=1e9)
    )
    model, batch = make_model(dropout=0.0).double(), ragged_rows()
    log_p = model(batch.tokens_BT).log_softmax(-1)
    picked = log_p.gather(-1, batch.labels_BT.clamp(min=0)[..., None])[..., 0]
    loss = -picked[batch.labels_BT != -100].mean()
    loss.backward()
    assert stats.loss == pytest.approx(float(loss), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(actual[name].double(), p.grad, rtol=1e-4, atol=1e-6)


def test_the_balance_loss_is_learned_from_and_not_logged(
    make_model: Models, make_config: Configs
) -> None:
    moe = {"n_experts": 4, "top_k": 2, "balance_coef": 0.5}
    whole, config = ragged_rows(), make_config(max_grad_norm=1e9)
    model = make_model(dropout=0.0, moe=moe)
    with_it, stats = gradients(model, [whole], config)
    plain = make_model(dropout=0.0, moe={**moe, "balance_coef": 0.0})
    without, plain_stats = gradients(plain, [whole], config)
    assert stats.loss == plain_stats.loss

    fresh = make_model(dropout=0.0, moe=moe)
    fresh(whole.tokens_BT)
    fresh.aux_loss().backward()
    name = "blocks.0.moe.router.weight"
    own = fresh.get_parameter(name).grad
    assert own.norm() > 1e-4
    torch.testing.assert_close(with_it[name] - without[name], own, rtol=1e-3, atol=1e-6)
    assert float(stats.metrics["balance_loss"]) == pytest.approx(float(fresh.aux_loss()))


def test_gradient_is_clipped_once_to_the_norm(make_model: Models, make_config: Configs) -> None:
    free, stats = gradients(make_model(), split(ragged_rows(), 2), make_config(max_grad_norm=1e9))
    clipped, same = gradients(make_model(), split(ragged_rows(), 2), make_config(max_grad_norm=0.1))
    norm = math.sqrt(sum(float(g.norm()) ** 2 for g in free.values()))
    assert stats.grad_norm == same.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * 0.1 / norm, rtol=1e-4, atol=1e-9)


def test_micro_batches_are_made_once(make_model: Models, make_config: Configs) -> None:
    made = []

    class Lazy:
        def __iter__(self) -> Any:
            made.append(1)
            return iter(split(ragged_rows(), 4))

    Update(make_model(), LMObjective(), make_config(), device=CPU)(Lazy(), step=0)
    assert len(made) == 1


def test_no_unit_in_the_whole_step_is_told(make_model: Models, make_config: Configs) -> None:
    batch = ragged_rows()
    nothing = TokenBatch(batch.tokens_BT, torch.full_like(batch.labels_BT, -100))
    with pytest.raises(DataError, match="step 6 has no token to learn from"):
        Update(make_model(), LMObjective(), make_config(), device=CPU)([nothing], step=5)


class Poisoned(LMObjective):
    """Multiplies the loss, or the gradient alone, by something that is not finite."""

    def __init__(self, *, loss: float = 1.0, gradient: float = 1.0) -> None:
        super().__init__()
        self.loss, self.gradient = loss, gradient

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        loss_sum = super().__call__(model, batch).loss_sum
        if self.gradient != 1.0:
            loss_sum.register_hook(lambda g: g * self.gradient)
        return Terms(loss_sum * self.loss)


@pytest.mark.parametrize(
    "poison",
    [{"loss": math.nan}, {"loss": math.inf}, {"gradient": math.nan}, {"gradient": math.inf}],
)
def test_nothing_is_updated_when_not_finite(
    make_model: Models, make_config: Configs, poison: dict[str, float]
) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update = Update(model, Poisoned(**poison), make_config(), device=CPU)
    with pytest.raises(DivergedError, match=r"step 3: loss=.*grad_norm="):
        update(split(ragged_rows(), 4), step=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(not part.state_dict()["state"] for part in update.optimizers.parts)


def test_diverged_names_the_data_rows(make_model: Models, make_config: Configs) -> None:
    class Rows(TokenBatch):
        index_B = torch.tensor([11, 42])  # noqa: N815

    batch = ragged_rows()
    update = Update(make_model(), Poisoned(loss=math.nan), make_config(), device=CPU)
    with pytest.raises(DivergedError, match=r"step 1 \(data rows \[11, 42\]\)"):
        update([Rows(batch.tokens_BT, batch.labels_BT)], step=0)


def test_first_loss_is_checked_before_the_update(
    make_model: Models, make_config: Configs, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(dropout=0.0)
    before = model.embedding.weight.detach().clone()
    update = Update(model, LMObjective(), make_config(), device=CPU)
    with pytest.raises(DivergedError, match=r"expected 0\.6931 \(ln 2\): off by more than 0\.0001"):
        update(
            [ragged_rows()], step=0, first_loss=FirstLoss(math.log(2), 1e-4, "ln 2", refuse=True)
        )
    assert torch.equal(model.embedding.weight, before)
    update.optimizers.zero_grad()
    update([ragged_rows()], step=0, first_loss=FirstLoss(math.log(32), 0.5, "ln V", refuse=True))
    assert not torch.equal(model.embedding.weight, before)


def test_bf16_autocast_keeps_float32_weights(make_model: Models, make_config: Configs) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        model = make_model(dropout=0.0)
        update = Update(model, LMObjective(), make_config(precision=precision), device=CPU)
        losses[precision] = [update([ragged_rows()], step=s).loss for s in range(5)]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_fp16_scaler_skips_an_overflow_and_gives_up_on_a_broken_gradient(
    make_model: Models, make_config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modern_llm.training.update.autocast", lambda *_: torch.autocast("cpu"))
    model = make_model()
    update = Update(model, Poisoned(gradient=math.inf), make_config(precision="fp16"), device=CPU)
    before = model.embedding.weight.detach().clone()
    stats = update(split(ragged_rows(), 4), step=0)  # overflow: no update, the scale halves
    assert stats.grad_norm == math.inf or math.isnan(stats.grad_norm)
    assert torch.equal(model.embedding.weight, before)
    assert update.scaler.get_scale() == 2.0**15
    with pytest.raises(DivergedError):
        for step in range(1, 40):
            update(split(ragged_rows(), 4), step=step)
    assert torch.equal(model.embedding.weight, before)

    model.zero_grad()
    update = Update(model, LMObjective(), make_config(precision="fp16"), device=CPU)
    update(split(ragged_rows(), 4), step=0)
    assert not torch.equal(model.embedding.weight, before)


def scaled(make_config: Configs, model: nn.Module, objective: Any, **options: Any) -> Update:
    """An update whose fp16 scaler is at work, over a model that computes in float32."""
    return Update(model, objective, make_config(precision="fp16", **options), device=CPU)


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 needs a GPU; the scaler does not."""
    monkeypatch.setattr("modern_llm.training.update.autocast", lambda *_: nullcontext())


@pytest.mark.usefixtures("no_autocast")
def test_clipping_sees_the_gradient_without_the_scale(
    make_model: Models, make_config: Configs
) -> None:
    """The scale is a power of two, so the step is that without one."""
    models = [make_model(dropout=0.0), make_model(dropout=0.0)]
    options = {"max_grad_norm": 0.1, "optimizer": "adamw", "eps": 1e-2}  # eps: the size counts
    plain = Update(models[0], LMObjective(), make_config(**options), device=CPU)
    fp16 = scaled(make_config, models[1], LMObjective(), **options)
    for step in range(3):
        stats = [u(split(ragged_rows(), 4), step=step) for u in (plain, fp16)]
        assert stats[0].grad_norm > 0.1
        assert stats[1].grad_norm == pytest.approx(stats[0].grad_norm, rel=1e-5)
    assert fp16.scaler.get_scale() == 2.0**16
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("no_autocast")
def test_the_scale_comes_back_with_the_state(make_model: Models, make_config: Configs) -> None:
    overflows = scaled(make_config, make_model(), Poisoned(gradient=math.inf))
    for step in range(2):
        overflows(split(ragged_rows(), 4), step=step)
    overflows.objective = LMObjective()
    overflows(split(ragged_rows(), 4), step=2)
    assert overflows.scaler.get_scale() == 2.0**14

    again = scaled(make_config, make_model(), LMObjective())
    again.load_state_dict(overflows.state_dict())
    assert again.scaler.state_dict() == overflows.scaler.state_dict()
    assert again.scaler.get_scale() == 2.0**14
    again(split(ragged_rows(), 4), step=3)
    assert again.scaler.state_dict()["_growth_tracker"] == 2  # of good steps in a row


def test_unknown_optimizer_is_refused(make_model: Models, make_config: Configs) -> None:
    with pytest.raises(ConfigError, match="unknown optimizer 'adamx'"):
        Update(make_model(), LMObjective(), make_config(optimizer="adamx"), device=CPU)

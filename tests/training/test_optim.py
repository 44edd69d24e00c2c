from collections.abc import Callable
from typing import Any

import pytest
import torch

from modern_llm.config import TrainingConfig
from modern_llm.errors import CheckpointError
from modern_llm.models import ModernDecoderLM
from modern_llm.training import OPTIMIZERS, build_optimizers
from modern_llm.training.optim import hidden_matrices

Models = Callable[..., ModernDecoderLM]
Configs = Callable[..., TrainingConfig]


def reference_adamw(
    p: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float, betas: tuple[float, float]
) -> torch.Tensor:
    """Algorithm 2 of arXiv:1711.05101 in float64."""
    p, m, v = p.double().clone(), 0.0, 0.0
    for t, g in enumerate((g.double() for g in grads), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * (m_hat / (v_hat.sqrt() + 1e-8) + decay * p)
    return p.float()


def test_adamw_decays_matrices_alone(make_model: Models, make_config: Configs) -> None:
    model = make_model(bias=True, sink="learned", norm="layernorm")
    config = make_config(lr=0.01, weight_decay=0.5, betas=(0.8, 0.9))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, config)
    rng = torch.Generator().manual_seed(0)
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in before}
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=rng)
            grads[name].append(p.grad.clone())
        optimizers.step()
    for name, p in model.named_parameters():
        decay = 0.5 if p.ndim == 2 else 0.0  # this model has no 2-D biases
        expected = reference_adamw(before[name], grads[name], 0.01, decay, (0.8, 0.9))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert {p.ndim for p in model.parameters()} == {1, 2}


def test_expert_biases_do_not_decay(make_model: Models, make_config: Configs) -> None:
    model = make_model(bias=True, moe={"n_experts": 2, "top_k": 1})
    decayed = {
        id(p)
        for group in build_optimizers(model, make_config()).groups()
        if group["weight_decay"] > 0
        for p in group["params"]
    }
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    weights = {n for n, _ in model.named_parameters() if n.endswith(".weight")}
    assert names == {n for n in weights if "norm" not in n}


def test_muon_takes_hidden_matrices_and_adamw_the_rest(
    make_model: Models, make_config: Configs
) -> None:
    model = make_model(tie_embeddings=False, bias=True, position="learned")
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for p in hidden_matrices(model)}
    assert hidden == {
        n for n in names.values() if n.startswith("blocks.") and n.endswith(".weight")
    } - {n for n in names.values() if "norm" in n}
    assert not any("embedding" in n or n.startswith("head") for n in hidden)

    optimizers = build_optimizers(model, make_config(optimizer="muon"))
    adamw, muon = optimizers.parts
    in_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    in_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert in_muon == hidden
    assert in_muon | in_adamw == set(names.values())
    assert not in_muon & in_adamw


def test_muon_step_is_orthogonal_with_the_size_of_adamw(
    make_model: Models, make_config: Configs
) -> None:
    model = make_model()
    optimizers = build_optimizers(model, make_config(optimizer="muon", lr=0.1, weight_decay=0.0))
    weight = hidden_matrices(model)[0]
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizers.step()
    update = (before - weight.detach()) / 0.1 / (0.2 * max(weight.shape) ** 0.5)
    singular = torch.linalg.svdvals(update)
    assert (singular - 1).abs().max() < 0.35  # five Newton-Schulz iterations, in bfloat16


def test_factor_scales_every_group(make_model: Models, make_config: Configs) -> None:
    config = make_config(optimizer={"name": "muon", "lr_ratio": 2.0}, lr=0.01)
    optimizers = build_optimizers(make_model(), config)
    for factor in (0.5, 0.25, 1.0):
        optimizers.set_factor(factor)
        rates = {g["lr"] for g in optimizers.groups()}
        assert rates == {0.01 * factor, 0.02 * factor}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_round_trip_goes_on_to_the_bit(
    name: str, make_model: Models, make_config: Configs, tmp_path: Any
) -> None:
    def train(model: ModernDecoderLM, optimizers: Any, steps: range) -> None:
        for step in steps:
            rng = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=rng)
            optimizers.step()

    config = make_config(optimizer=name)
    whole = make_model()
    train(whole, build_optimizers(whole, config), range(6))

    half = make_model()
    first = build_optimizers(half, config)
    train(half, first, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = build_optimizers(half, config)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(half, second, range(3, 6))
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_optimizer_is_refused(make_model: Models, make_config: Configs) -> None:
    state = build_optimizers(make_model(), make_config(optimizer="muon")).state_dict()
    adamw = build_optimizers(make_model(), make_config())
    with pytest.raises(CheckpointError, match="use the optimizer that the run began with"):
        adamw.load_state_dict(state)


def test_hyperparameters_come_from_the_config_not_from_the_state(
    make_model: Models, make_config: Configs
) -> None:
    state = build_optimizers(make_model(), make_config(lr=0.1)).state_dict()
    changed = build_optimizers(make_model(), make_config(lr=0.2, weight_decay=0.7))
    changed.load_state_dict(state)
    changed.set_factor(1.0)
    assert {g["lr"] for g in changed.groups()} == {0.2}
    assert {g["weight_decay"] for g in changed.groups()} == {0.7, 0.0}

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from modern_llm.config import Component, ModelConfig
from modern_llm.models import ACTIVATIONS, FFNS, ModernDecoderLM
from modern_llm.models.dims import Dims
from modern_llm.models.initialize import initialize
from modern_llm.models.linear import GroupedLinear
from modern_llm.models.moe import MoE, Routing

DIMS = Dims(d_model=8, n_heads=2, n_kv_heads=2, head_size=4, d_ff=12, max_seq_len=16, bias=True)


def config(**changes: object) -> ModelConfig:
    sizes = dict(vocab_size=11, d_model=8, n_layers=2, n_heads=2, d_ff=12, max_seq_len=16)
    return ModelConfig(**{**sizes, "init_std": 0.3, **changes})


def layer(**changes: object) -> MoE:
    torch.manual_seed(0)
    settings = config(moe={"n_experts": 4, "top_k": 2}, bias=True, **changes)
    moe = MoE(settings, Dims.of(settings), settings.moe)
    initialize(moe, settings)
    for name, parameter in moe.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return moe


@pytest.mark.parametrize(
    ("name", "nonlinearity"),
    [
        ("swiglu", lambda g: g * torch.sigmoid(g)),
        ("geglu", lambda g: 0.5 * g * (1 + torch.erf(g / math.sqrt(2)))),
    ],
)
def test_gated_ones_are_their_formula(name: str, nonlinearity: Callable[..., Any]) -> None:
    ffn = FFNS.build(name, DIMS, "relu")
    for parameter in ffn.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 8)
    gate, up = ffn.gate_up.weight.chunk(2)
    gate_bias, up_bias = ffn.gate_up.bias.chunk(2)
    hidden = nonlinearity(x @ gate.T + gate_bias) * (x @ up.T + up_bias)
    expected = hidden @ ffn.down.weight.T + ffn.down.bias
    torch.testing.assert_close(ffn(x), expected, rtol=1e-5, atol=1e-5)


def test_relu2_is_its_formula() -> None:
    ffn = FFNS.build("relu2", DIMS, "gelu")
    for parameter in ffn.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 8)
    h = x @ ffn.up.weight.T + ffn.up.bias
    h = torch.where(h > 0, h * h, torch.zeros_like(h))
    torch.testing.assert_close(ffn(x), h @ ffn.down.weight.T + ffn.down.bias, rtol=1e-5, atol=1e-5)


def test_leaky_relu_leaks_a_hundredth() -> None:
    x = torch.tensor([-3.0, 0.0, 2.0])
    torch.testing.assert_close(ACTIVATIONS["leaky_relu"](x), torch.tensor([-0.03, 0.0, 2.0]))


def test_standard_is_its_formula() -> None:
    ffn = FFNS.build("standard", DIMS, "gelu")
    for parameter in ffn.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 8)
    h = x @ ffn.up.weight.T + ffn.up.bias
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    torch.testing.assert_close(ffn(x), h @ ffn.down.weight.T + ffn.down.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FFNS))
def test_a_default_width_gives_every_feed_forward_the_same_size(name: str) -> None:
    sizes = dict(vocab_size=11, d_model=96, n_layers=1, n_heads=2, max_seq_len=16)
    settings = ModelConfig(**sizes, ffn=name)
    ffn = FFNS.build(name, Dims.of(settings), settings.activation)
    n_parameters = sum(parameter.numel() for parameter in ffn.parameters())
    told = f"is {name} gated? then it belongs into GATED_FFNS of modern_llm/config/model.py"
    assert n_parameters == pytest.approx(8 * 96**2, rel=0.02), told


@pytest.mark.parametrize("ffn", sorted(FFNS))
def test_mixture_is_the_gated_sum_of_its_experts(ffn: str) -> None:
    """Against each expert as a dense feed-forward, one token at a time, in float64."""
    moe = layer(ffn=ffn)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    out, routing = moe(x)
    experts = []
    for e in range(4):
        dense = FFNS.build(Component(ffn), Dims.of(config(bias=True)), "gelu").double()
        dense.load_state_dict({n: p[e].double() for n, p in moe.experts.named_parameters()})
        experts.append(dense)
    load = torch.zeros(4)
    probs = []
    for actual, token in zip(out.flatten(0, 1), x.flatten(0, 1).double(), strict=True):
        prob = (moe.router.weight.double() @ token).softmax(0)
        probs.append(prob)
        best = prob.topk(2).indices.tolist()
        load[best] += 1
        total = sum(prob[e] for e in best)
        expected = sum(prob[e] / total * experts[e](token) for e in best)
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routing.load_E, load / 20)
    torch.testing.assert_close(routing.prob_E, torch.stack(probs).mean(0).float())


def test_the_router_of_one_expert_a_token_learns_from_the_output() -> None:
    settings = config(moe={"n_experts": 4, "top_k": 1, "balance_coef": 0.0})
    torch.manual_seed(0)
    moe = MoE(settings, Dims.of(settings), settings.moe)
    initialize(moe, settings)
    x = torch.randn(1, 6, 8)
    out, _ = moe(x)
    out.square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 1e-6
    # Switch, eq. 2: the expert's output times its probability.
    token = x[0, 2]
    prob = (moe.router.weight @ token).softmax(0)
    best = int(prob.argmax())
    dense = FFNS.build(Component("swiglu"), Dims.of(settings), "gelu")
    dense.load_state_dict({n: p[best] for n, p in moe.experts.named_parameters()})
    torch.testing.assert_close(out[0, 2], prob[best] * dense(token), rtol=1e-4, atol=1e-6)


def test_balance_loss() -> None:
    even = torch.full((4,), 0.25)
    assert Routing(even, even).balance_loss().item() == pytest.approx(1.0)
    one = torch.tensor([1.0, 0, 0, 0])
    assert Routing(one, one).balance_loss().item() == pytest.approx(4.0)


def test_aux_loss_is_the_weighted_sum_over_layers() -> None:
    torch.manual_seed(0)
    model = ModernDecoderLM(config(moe={"n_experts": 4, "balance_coef": 0.5}))
    model(torch.randint(0, 11, (2, 7)))
    load = model.moe_load()
    assert list(load) == ["layer.0", "layer.1"]
    assert all(x.sum().item() == pytest.approx(1.0) for x in load.values())
    expected = 0.5 * sum(r.balance_loss().item() for _, r in model._routing)
    assert model.aux_loss().item() == pytest.approx(expected)
    model.aux_loss().backward()
    assert model.blocks[1].moe.router.weight.grad.any()


def test_every_second_layer() -> None:
    model = ModernDecoderLM(config(n_layers=4, moe={"n_experts": 4, "every": 2}))
    assert [block.moe is not None for block in model.blocks] == [False, True, False, True]
    assert ModernDecoderLM(config()).aux_loss() is None


@pytest.mark.parametrize("counts", [[3, 0, 4], [7, 0, 0], [0, 0, 7]])
def test_grouped_linear_gradients(counts: list[int]) -> None:
    """Groups without rows too: their gradient is zero, not missing."""
    rng = torch.Generator().manual_seed(0)
    linear = GroupedLinear(3, 5, 4, bias=True).double()
    linear.weight.data.normal_(generator=rng)
    linear.bias.data.normal_(generator=rng)
    x = torch.randn(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor(counts)
    group = torch.repeat_interleave(torch.arange(3), rows)
    expected = torch.einsum("mi,moi->mo", x, linear.weight[group]) + linear.bias[group]
    torch.testing.assert_close(linear(x, rows), expected)
    leaves = [x, linear.weight, linear.bias]
    weight = torch.randn(7, 4, generator=rng, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((linear(x, rows) * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_token_is_not_moved_by_its_neighbours() -> None:
    moe = layer()
    x = torch.randn(1, 6, 8)
    together = moe(x)[0]
    alone = torch.cat([moe(x[:, t : t + 1])[0] for t in range(6)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert F.cosine_similarity(together, alone, dim=-1).min() > 0.999

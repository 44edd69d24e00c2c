import math

import pytest
import torch

from modern_llm.config import Component, ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM
from modern_llm.models.dims import Dims
from modern_llm.models.positions import POSITIONS, RoPE

DIMS = Dims(d_model=24, n_heads=3, n_kv_heads=3, head_size=8, d_ff=48, max_seq_len=32)


def test_rope_turns_each_pair_by_its_angle() -> None:
    rope = RoPE(DIMS, theta=500.0)
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    pos = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 30, 31]])
    out = rope.rotate(x, rope.prepare(pos))
    for b, t, n, i in torch.cartesian_prod(*map(torch.arange, (2, 5, 3, 4))).tolist():
        angle = pos[b, t].item() * 500.0 ** (-2 * i / 8)
        a, c = x[b, t, n, i].item(), x[b, t, n, i + 4].item()
        assert out[b, t, n, i].item() == pytest.approx(
            a * math.cos(angle) - c * math.sin(angle), abs=1e-5
        )
        assert out[b, t, n, i + 4].item() == pytest.approx(
            a * math.sin(angle) + c * math.cos(angle), abs=1e-5
        )


def test_rope_logits_depend_on_the_distance_only() -> None:
    rope = RoPE(DIMS)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def logit(t: int, s: int) -> float:
        turned = [rope.rotate(x, rope.prepare(torch.tensor([[p]]))) for x, p in ((q, t), (k, s))]
        return (turned[0] * turned[1]).sum().item()

    assert logit(5, 2) == pytest.approx(logit(29, 26), abs=1e-5)
    assert logit(5, 2) != pytest.approx(logit(5, 3), abs=1e-3)


def test_rope_gradient_is_that_of_finite_differences() -> None:
    rope = RoPE(DIMS)
    rope.table = rope.table.double()
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: rope.rotate(x, rope.prepare(torch.arange(3)[None])), x
    )


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_no_cast_reaches_rope_angles(cast) -> None:
    """A bfloat16 buffer cannot tell position 256 from 257 (transformers#29285)."""
    config = ModelConfig(vocab_size=11, d_model=24, n_layers=1, n_heads=3, max_seq_len=2048)
    model = ModernDecoderLM(config)
    before = model.position.table.clone()
    assert (
        model.position.rotate(
            torch.zeros(1, 1, 1, 8), model.position.prepare(torch.zeros(1, 1, dtype=torch.long))
        ).dtype
        is torch.float32
    )
    model = cast(model)
    assert model.position.table.dtype is torch.float32
    assert torch.equal(model.position.table, before)
    assert not any("table" in name for name in model.state_dict())
    assert not list(model.buffers())


def test_rope_angles_follow_the_device() -> None:
    with torch.device("meta"):
        rope = RoPE(DIMS)
    assert rope.table.is_meta
    rope.to_empty(device="cpu")
    assert torch.equal(rope.table, RoPE(DIMS).table)


def test_rope_refuses_odd_heads_and_bad_options() -> None:
    with pytest.raises(ConfigError, match="even"):
        RoPE(Dims(9, 3, 3, 3, 9, 8))
    with pytest.raises(ConfigError, match="theta"):
        RoPE(DIMS, theta=0.0)
    with pytest.raises(ConfigError, match=r"factor=1\.0 must be above 1"):
        RoPE(DIMS, scaling="yarn")
    with pytest.raises(ConfigError, match="options of scaling=yarn"):
        RoPE(DIMS, scaling="linear", factor=2.0, beta_fast=16.0)
    with pytest.raises(ConfigError, match="must be even"):
        POSITIONS.build("sinusoidal", Dims(9, 3, 3, 3, 9, 8))
    with pytest.raises(ConfigError, match="steepness"):
        POSITIONS.build(Component("alibi", steepness=0.0), DIMS)
    with pytest.raises(ConfigError, match="did you mean 'theta'"):
        POSITIONS.check("rope", {"thetta": 1.0})


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_hooks_keep_shapes(name: str) -> None:
    position = POSITIONS.build(Component(name), DIMS)
    pos = torch.arange(6).view(2, 3)
    x_BTD, x_BTNH = torch.randn(2, 3, 24), torch.randn(2, 3, 5, 8)
    assert position.embed(x_BTD, pos).shape == x_BTD.shape
    assert position.rotate(x_BTNH, position.prepare(pos)).shape == x_BTNH.shape
    bias = position.bias(pos, pos)
    assert bias is None or bias.shape[1:] == (3, 3, 3)
    count = sum(p.numel() for p in position.parameters())
    assert position.cost(8).params == count


@pytest.mark.parametrize("name", sorted(set(POSITIONS) - {"none"}))
def test_order_matters(name: str) -> None:
    """Swapping two earlier tokens changes the last token's logits of a one-layer model."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=11, d_model=24, n_layers=1, n_heads=3, max_seq_len=8, position=name, init_std=0.5
    )
    model = ModernDecoderLM(config).eval()
    a, b = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert (a[0, -1] - b[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
def test_alibi_is_its_formula(n_heads: int) -> None:
    dims = Dims(
        d_model=8 * n_heads, n_heads=n_heads, n_kv_heads=1, head_size=8, d_ff=8, max_seq_len=32
    )
    pos_T, pos_S = (
        torch.tensor([[3, 4], [9, 10]]),
        torch.tensor([[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]),
    )
    bias = POSITIONS.build(Component("alibi"), dims).bias(pos_T, pos_S)
    power = 2 ** math.floor(math.log2(n_heads))
    for n in range(n_heads):
        # Heads beyond the power of two below fill the gaps of the geometric sequence.
        exponent = 8 * (n + 1) / power if n < power else 8 * (2 * (n - power) + 1) / (2 * power)
        for b, t, s in torch.cartesian_prod(*map(torch.arange, (2, 2, 5))).tolist():
            distance = (pos_T[b, t] - pos_S[b, s]).item()
            assert bias[b, n, t, s].item() == pytest.approx(-(2**-exponent) * distance, abs=1e-6)


def test_sinusoid_is_its_formula() -> None:
    position = POSITIONS.build(Component("sinusoidal"), DIMS)
    x = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(0))
    out = position.embed(x, torch.tensor([[5, 31]]))
    for t, pos in enumerate((5, 31)):
        for i in range(12):
            angle = pos / 10_000 ** (2 * i / 24)
            for d, wave in ((2 * i, math.sin), (2 * i + 1, math.cos)):
                expected = x[0, t, d].item() * math.sqrt(24) + wave(angle)
                assert out[0, t, d].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_stretched_rope_equals_transformers(scaling: str, theta: float) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=512,
        rope_parameters={
            "rope_type": scaling, "rope_theta": theta, "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    )  # fmt: skip
    frequency, sharper = utils.ROPE_INIT_FUNCTIONS[scaling](config, "cpu")
    dims = Dims(d_model=64, n_heads=1, n_kv_heads=1, head_size=64, d_ff=8, max_seq_len=512)
    cos, sin = RoPE(dims, theta=theta, scaling=scaling, factor=4.0).prepare(torch.tensor([[77]]))
    torch.testing.assert_close(
        cos[0, 0, 0, :32], (77 * frequency).cos() * sharper, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        sin[0, 0, 0, 32:], (77 * frequency).sin() * sharper, rtol=0, atol=1e-5
    )

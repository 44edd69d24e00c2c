import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from modern_llm.errors import ConfigError
from modern_llm.models.kernels import KERNELS
from modern_llm.models.kernels.sdpa import takes_groups


def reference_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    bias_NTS: Tensor,
    sink_N: Tensor | None,
    softcap: float = math.inf,
) -> Tensor:
    """exp(logit) / (exp(sink) + sum exp(logit)) v in float64, one row and one head at a time."""
    rows, heads = q_BNTH.shape[:2]
    group = heads // k_BKSH.shape[1]
    out_BNTH = torch.empty_like(q_BNTH, dtype=torch.float64)
    for b, n in itertools.product(range(rows), range(heads)):
        q_TH, k_SH, v_SH = (
            x.double() for x in (q_BNTH[b, n], k_BKSH[b, n // group], v_BKSH[b, n // group])
        )
        logit_TS = q_TH @ k_SH.T / math.sqrt(q_TH.shape[-1])
        if softcap < math.inf:
            logit_TS = softcap * (logit_TS / softcap).tanh()
        weight_TS = (logit_TS + bias_NTS[n].double()).exp()
        total_T = weight_TS.sum(-1)
        if sink_N is not None:
            total_T = total_T + sink_N[n].double().exp()
        out_BNTH[b, n] = weight_TS / total_T[:, None] @ v_SH
    return out_BNTH


def inputs(n_kv_heads: int, n_keys: int = 7) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=rng)
    k, v = torch.randn(2, 2, n_kv_heads, n_keys, 8, generator=rng)
    bias = torch.randn(4, 5, n_keys, generator=rng)
    bias += torch.full((5, n_keys), -math.inf).triu(1 + n_keys - 5)
    return q, k, v, bias, torch.randn(4, generator=rng)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernel_matches_float64_reference(name: str, n_kv_heads: int, with_sink: bool) -> None:
    q, k, v, bias, sink = inputs(n_kv_heads)
    sink_N = sink if with_sink else None
    actual = KERNELS.build(name)(q, k, v, bias, sink_N=sink_N)
    expected = reference_attention(q, k, v, bias, sink_N).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_causal_matches_float64_reference(name: str, n_kv_heads: int, with_sink: bool) -> None:
    q, k, v, _, sink = inputs(n_kv_heads, n_keys=5)
    causal = torch.full((4, 5, 5), -math.inf).triu(1)
    sink_N = sink if with_sink else None
    actual = KERNELS.build(name)(q, k, v, is_causal=True, sink_N=sink_N)
    expected = reference_attention(q, k, v, causal, sink_N).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_sink", [False, True])
def test_repeated_keys_are_what_a_group_shares(
    monkeypatch: pytest.MonkeyPatch, with_sink: bool
) -> None:
    """What a GPU computes where its fused kernels take no groups, computed here."""
    monkeypatch.setattr("modern_llm.models.kernels.sdpa.takes_groups", lambda q, bias: False)
    q, k, v, bias, sink = inputs(2)
    sink_N = sink if with_sink else None
    actual = KERNELS.build("sdpa")(q, k, v, bias, sink_N=sink_N)
    expected = reference_attention(q, k, v, bias, sink_N).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_which_calls_of_a_gpu_take_groups() -> None:
    with torch.device("meta"):
        half, single = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    gpu = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    assert takes_groups(gpu, None)
    assert not takes_groups(gpu, half)
    assert not takes_groups(SimpleNamespace(dtype=torch.float32, device=gpu.device), None)
    assert takes_groups(single, single)  # elsewhere


CAPPING = sorted(name for name in KERNELS if "softcap" not in KERNELS[name].refuses)
TRAINING = sorted(set(KERNELS) - {"flex"})  # on a CPU


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAPPING)
def test_soft_cap_matches_float64_reference(name: str, dtype: torch.dtype, causal: bool) -> None:
    q, k, v, bias, sink = inputs(2, n_keys=5)
    if causal:
        bias = torch.full((4, 5, 5), -math.inf).triu(1)
    expected = reference_attention(4 * q, k, v, bias, sink, softcap=2.0)
    actual = KERNELS.build(name)(
        *(x.to(dtype) for x in (4 * q, k, v)), None if causal else bias.to(dtype),
        is_causal=causal, sink_N=sink, softcap=2.0,
    )  # fmt: skip
    rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (0.05, 0.05)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)
    assert (expected - reference_attention(4 * q, k, v, bias, sink)).abs().max() > 0.1


def test_flex_refuses_to_train_on_a_cpu() -> None:
    q, k, v, bias, _ = inputs(2)
    with pytest.raises(ConfigError, match="no backward on a CPU"):
        KERNELS.build("flex")(q.requires_grad_(), k, v, bias)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize("name", TRAINING)
def test_gradients_match_float64_reference(name: str, n_kv_heads: int, with_sink: bool) -> None:
    """For queries, keys, values and the sink; with no attention bias and with one."""
    q, k, v, bias, sink = inputs(n_kv_heads)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    grads = []
    for kernel in (
        lambda q, k, v, s: KERNELS.build(name)(q, k, v, bias, sink_N=s),
        lambda q, k, v, s: reference_of(q, k, v, bias, s),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *([sink] if with_sink else []))]
        out = kernel(*leaves[:3], leaves[3] if with_sink else None)
        grads.append(torch.autograd.grad((out * weight).sum(), leaves))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def reference_of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink_N: Tensor | None) -> Tensor:
    """The reference, differentiable: all heads at once, float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
    weight = (q.double() @ k.mT / math.sqrt(q.shape[-1]) + bias).exp()
    total = weight.sum(-1, keepdim=True)
    if sink_N is not None:
        total = total + sink_N.double().exp()[:, None, None]
    return weight / total @ v


def test_sink_takes_attention_away() -> None:
    q, k, v, bias, _ = inputs(4)
    for name in KERNELS:
        out = KERNELS.build(name)(q, k, v, bias, sink_N=torch.full((4,), 50.0))
        assert out.abs().max() < 1e-6


def test_sink_equals_gpt_oss() -> None:
    module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")

    class Layer(torch.nn.Module):
        num_key_value_groups = 2
        training = False

    layer = Layer()
    q, k, v, bias, sink = inputs(2)
    layer.sinks = torch.nn.Parameter(sink)
    expected, _ = module.eager_attention_forward(layer, q, k, v, bias[None], scaling=8**-0.5)
    for name in KERNELS:
        actual = KERNELS.build(name)(q, k, v, bias, sink_N=sink).transpose(1, 2)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in TRAINING if "dropout" not in KERNELS[n].refuses])
def test_dropout_keeps_the_expectation(name: str) -> None:
    torch.manual_seed(0)
    q, k, v, bias, _ = inputs(4)
    kernel = KERNELS.build(name)
    mean = torch.stack([kernel(q, k, v, bias, dropout=0.5) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, kernel(q, k, v, bias), rtol=0, atol=0.2)


def test_bfloat16_stays_bfloat16_and_near() -> None:
    q, k, v, bias, sink = inputs(2)
    for name, sink_N in itertools.product(KERNELS, (None, sink)):
        args = (x.bfloat16() for x in (q, k, v))
        actual = KERNELS.build(name)(*args, bias.bfloat16(), sink_N=sink_N)
        assert actual.dtype is torch.bfloat16
        expected = reference_attention(q, k, v, bias, sink_N)
        torch.testing.assert_close(actual.double(), expected, rtol=0.05, atol=0.05)

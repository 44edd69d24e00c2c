import pytest
import torch
from torch import Tensor

from modern_llm.models.norms import NORMS


def reference(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The norm in float64, one row at a time."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        if name.startswith("layernorm"):
            row = row - row.mean()
        length = max((row**2).sum().item() ** 0.5, eps)
        row = row / (length if name == "scalenorm" else torch.sqrt((row**2).mean() + eps))
        row = row * weight.double()
        rows.append(row if bias is None else row + bias.double())
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", sorted(NORMS))
def test_matches_float64_reference(name: str, with_bias: bool) -> None:
    torch.manual_seed(0)
    norm = NORMS.build(name, 16, 1e-5, with_bias)
    for parameter in norm.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 3, 16) * 7 + 2
    expected = reference(name, x, norm.weight, getattr(norm, "bias", None), 1e-5)
    torch.testing.assert_close(norm(x), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(NORMS))
def test_statistics_are_float32_below_float32(name: str) -> None:
    """1024 squares of 300 overflow float16 and lose all digits in bfloat16."""
    norm = NORMS.build(name, 1024, 1e-5, False).half()
    x = (torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)) * 300).half()
    out = norm(x)
    assert out.dtype is torch.float16
    expected = reference(name, x, norm.weight, None, 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", sorted(NORMS))
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    norm = NORMS.build(name, 5, 1e-5, True).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(norm.weight, requires_grad=True)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(f, (x, weight))


def test_scalenorm_starts_with_unit_variance_and_takes_a_zero_row() -> None:
    norm = NORMS.build("scalenorm", 64, 1e-5, False)
    out = norm(torch.stack([torch.randn(64), torch.zeros(64)]))
    assert out[0].pow(2).mean().item() == pytest.approx(1.0, rel=1e-5)
    assert not out[1].any()


def test_only_layernorm_has_a_bias_and_only_when_asked() -> None:
    for name in set(NORMS) - {"layernorm"}:
        assert [n for n, _ in NORMS.build(name, 4, 1e-5, True).named_parameters()] == ["weight"]
    assert len(list(NORMS.build("layernorm", 4, 1e-5, True).parameters())) == 2
    assert len(list(NORMS.build("layernorm", 4, 1e-5, False).parameters())) == 1

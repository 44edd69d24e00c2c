"""Cross entropy in chunks is the cross entropy of all logits, in value and gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modern_llm.config import ModelConfig
from modern_llm.data import collate
from modern_llm.models import ModernDecoderLM
from modern_llm.models.loss import IGNORE, chunk_loss, chunked_loss_sum, token_loss_sum

VOCAB = 61
SIZES = dict(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=24)
CHUNKS = [0, 1, 7, 24, 72, 1000]  # all; one token; ragged; even; all in one; more than there are


def make_model(dtype: torch.dtype = torch.float32, **changes: Any) -> ModernDecoderLM:
    torch.manual_seed(0)
    return ModernDecoderLM(ModelConfig(**SIZES, **changes)).to(dtype)


def text(share: float = 0.7) -> tuple[Tensor, Tensor]:
    """Tokens and labels (3, 24), of which about ``share`` are supervised."""
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (3, 25), generator=rng)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=rng) >= share] = IGNORE
    return tokens[:, :-1], labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def reference(model: ModernDecoderLM) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and gradients in float64, from the logits of all tokens and the formula itself."""
    exact = make_model(torch.float64, **model.config.model_dump(include={"tie_embeddings"}))
    exact.load_state_dict(model.state_dict())
    tokens_BT, labels_BT = text()
    logits_MV, label_M = exact(tokens_BT).flatten(0, 1), labels_BT.flatten()
    kept_M = label_M >= 0
    picked_M = logits_MV[kept_M, label_M[kept_M]]
    loss = (logits_MV[kept_M].exp().sum(1).log() - picked_M).sum()
    loss.backward()
    return loss.item(), gradients(exact)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_matches_float64_and_the_plain_loss(chunk: int, tied: bool, gather: bool) -> None:
    model = make_model(tie_embeddings=tied)
    tokens_BT, labels_BT = text()
    plain = token_loss_sum(model(tokens_BT), labels_BT)
    plain.backward()
    of_plain = gradients(model)

    options: dict[str, Tensor] = {}
    labels_M = labels_BT
    if gather:
        options["at_M"] = (labels_BT.flatten() != IGNORE).nonzero().squeeze(1)
        labels_M = labels_BT.flatten()[options["at_M"]]
    loss = model(tokens_BT, labels_M=labels_M, loss_chunk=chunk, **options)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)

    exact, of_exact = reference(model)
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, of_plain[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient.double(), of_exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",)])
def test_gradient_by_finite_differences(frozen: tuple[str, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(7, 4, generator=rng, dtype=torch.float64)
    weight_VD = torch.randn(9, 4, generator=rng, dtype=torch.float64)
    labels_M = torch.tensor([0, 8, IGNORE, 3, 3, IGNORE, 5])
    hidden_MD.requires_grad_("hidden" not in frozen)
    weight_VD.requires_grad_("weight" not in frozen)

    def half(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = chunked_loss_sum(hidden, weight, labels_M, chunk=3, dtype=torch.float64)
        return 0.5 * loss  # what comes after the loss scales both gradients

    assert torch.autograd.gradcheck(half, (hidden_MD, weight_VD))


def test_bf16_is_as_near_to_float64_as_the_plain_loss() -> None:
    """The head's gradient is summed up over chunks in float32, not in bfloat16."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=rng)
    weight = (0.05 * torch.randn(997, 64, generator=rng)).requires_grad_()
    labels = torch.randint(0, 997, (512,), generator=rng)
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="sum")
    (of_exact,) = torch.autograd.grad(exact, weight)

    def error(loss: Tensor) -> tuple[float, float]:
        (of_weight,) = torch.autograd.grad(loss, weight)
        return abs(loss.item() / exact.item() - 1), float((of_weight - of_exact).norm())

    with torch.autocast("cpu", torch.bfloat16):
        plain = error(token_loss_sum(F.linear(hidden, weight), labels))
        chunked = error(chunked_loss_sum(hidden, weight, labels, chunk=32, dtype=torch.bfloat16))
    assert chunked[0] < 1e-4  # plain cross entropy of bfloat16 logits is off by 5e-3
    assert chunked[1] < 1.05 * plain[1]
    assert chunked[1] < 0.01 * float(of_exact.norm())


def test_autocast_reaches_the_chunks() -> None:
    model, (tokens_BT, labels_BT) = make_model(), text()
    with torch.autocast("cpu", torch.bfloat16):
        plain = token_loss_sum(model(tokens_BT), labels_BT)
        loss = model(tokens_BT, labels_M=labels_BT, loss_chunk=10)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)  # of the same bfloat16 logits
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor that an operation makes, in forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_holds_all_logits(grad: bool) -> None:
    hidden_MD, weight_VD = torch.randn(256, 4), torch.randn(97, 4)
    labels_M = torch.arange(256) % 97
    for chunk, numel in ((8, 256 * 4), (0, 256 * 97)):  # hidden states at most, or all logits
        with LargestTensor() as seen:
            loss = chunked_loss_sum(
                hidden_MD.requires_grad_(grad), weight_VD, labels_M,
                chunk=chunk, dtype=torch.float32,
            )  # fmt: skip
            if grad:
                loss.backward()
        assert seen.numel <= numel
    assert seen.numel == 256 * 97  # the probe sees them


@pytest.mark.parametrize("gather", [False, True])
def test_no_supervised_token_gives_zero_never_nan(gather: bool) -> None:
    model, (tokens_BT, labels_BT) = make_model(), text(share=0.0)
    options: dict[str, Tensor] = {"at_M": torch.empty(0, dtype=torch.long)} if gather else {}
    labels_M = torch.empty(0, dtype=torch.long) if gather else labels_BT
    loss = model(tokens_BT, labels_M=labels_M, loss_chunk=16, **options)
    loss.backward()
    assert loss.item() == 0.0
    assert all(float(g.abs().sum()) == 0.0 for g in gradients(model).values())


def test_without_gradients_the_same_value() -> None:
    model, (tokens_BT, labels_BT) = make_model(), text()
    with_graph = model(tokens_BT, labels_M=labels_BT, loss_chunk=16)
    with torch.no_grad():
        alone = model(tokens_BT, labels_M=labels_BT, loss_chunk=16)
    assert not alone.requires_grad
    assert alone.item() == pytest.approx(with_graph.item(), rel=1e-6)


def test_loss_of_a_chunk_is_closed_form() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [50.0, 0.0], [1.0, 2.0]])
    loss, grad = chunk_loss(logits, torch.tensor([1, 0, IGNORE]))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    torch.testing.assert_close(grad[0], torch.tensor([0.25, -0.25]))
    assert grad[1].tolist() == pytest.approx([-math.exp(-50), math.exp(-50)], rel=1e-5)
    assert grad[2].tolist() == [0.0, 0.0]


def test_a_sure_prediction_keeps_its_gradient_in_bf16() -> None:
    """``p - 1`` is taken before rounding: ``p`` itself is 1 in bfloat16."""
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16)
    _, grad = chunk_loss(logits, torch.tensor([0]))
    wrong = 1 / (1 + math.exp(8.0))
    assert grad.dtype is torch.bfloat16
    assert grad[0].tolist() == pytest.approx([-wrong, wrong], rel=2**-8)


@pytest.mark.parametrize("whole", [False, True])
def test_compiles_without_breaks(whole: bool) -> None:
    torch._dynamo.reset()
    model, (tokens_BT, labels_BT) = make_model(), text()
    curves = []
    for compiled in (False, True):
        if compiled and whole:
            nn.Module.compile(model, fullgraph=True, backend="aot_eager")
        elif compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        loss = model(tokens_BT, labels_M=labels_BT, loss_chunk=30)
        loss.backward()
        curves.append([loss.detach(), *gradients(model).values()])
    for expected, actual in zip(*curves, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_to_machine_code(dtype: torch.dtype) -> None:
    """Value and gradient of a compiled chunk, and of a ragged last one, are the eager ones."""
    torch._dynamo.reset()
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(96, VOCAB, generator=rng).to(dtype)
    labels = torch.randint(0, VOCAB, (96,), generator=rng)
    labels[::5] = IGNORE
    compiled = torch.compile(chunk_loss, fullgraph=True)
    for rows in (slice(0, 64), slice(64, 96)):
        loss, grad = chunk_loss(logits[rows].clone(), labels[rows])
        own_loss, own_grad = compiled(logits[rows].clone(), labels[rows])
        assert own_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert own_grad.dtype is dtype
        torch.testing.assert_close(own_grad, grad)


def test_label_and_argument_rules() -> None:
    assert IGNORE == collate.IGNORE
    with pytest.raises(ValueError, match="loss_chunk is of the loss: it needs labels_M"):
        make_model()(text()[0], loss_chunk=8)

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modern_llm.data.collate import TokenBatch
from modern_llm.errors import DataError
from modern_llm.models import ModernDecoderLM
from modern_llm.training import LMObjective, mean_loss, token_loss_sum

Models = Callable[..., ModernDecoderLM]


def reference_loss_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> float:
    """Token by token in float64."""
    total = 0.0
    for row, labels in zip(logits_BTV.double(), labels_BT, strict=True):
        for logits, label in zip(row, labels.tolist(), strict=True):
            if label != -100:
                total += math.log(sum(math.exp(x) for x in logits.tolist())) - float(logits[label])
    return total


def batch(seed: int = 0, *, share: float = 0.5, docs: bool = False) -> TokenBatch:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 32, (3, 9), generator=rng)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=rng) >= share] = -100
    doc_ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]).expand(3, -1) if docs else None
    return TokenBatch(tokens[:, :-1], labels, doc_ids)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("docs", [False, True])
def test_lm_loss_matches_float64_reference(
    make_model: Models, gather: bool, docs: bool, chunk: int
) -> None:
    model, data = make_model(dropout=0.0), batch(docs=docs)
    objective = LMObjective(gather=gather, chunk=chunk)
    actual = objective(model, data).loss_sum
    logits = model(data.tokens_BT, doc_ids_BT=data.doc_ids_BT).detach()
    assert float(actual.detach()) == pytest.approx(
        reference_loss_sum(logits, data.labels_BT), rel=1e-5
    )
    supervised = int((data.labels_BT != -100).sum())
    assert objective.units(data) == supervised
    assert objective.scored(data) == (supervised if gather else data.n_tokens)


@pytest.mark.parametrize(("gather", "chunk"), [(True, 0), (False, 5), (True, 5)])
def test_gathered_or_chunked_logits_give_the_same_gradient(
    make_model: Models, gather: bool, chunk: int
) -> None:
    grads = []
    for objective in (LMObjective(), LMObjective(gather=gather, chunk=chunk)):
        model = make_model(dropout=0.0)
        objective(model, batch(share=0.2)).loss_sum.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gather", [False, True])
def test_no_supervised_token_gives_zero_never_nan(make_model: Models, gather: bool) -> None:
    model, empty = make_model(), batch(share=0.0)
    objective = LMObjective(gather=gather)
    loss_sum = objective(model, empty).loss_sum
    loss_sum.backward()
    assert (objective.units(empty), loss_sum.item()) == (0, 0.0)
    assert all(float(p.grad.abs().sum()) == 0.0 for p in model.parameters())


def test_loss_is_float32_for_logits_in_bfloat16() -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(1))
    loss = token_loss_sum(logits, labels)
    assert loss.dtype == torch.float32
    expected = reference_loss_sum(logits[None].float(), labels[None])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_chunked_loss_calls_the_model_once_and_gets_no_logits() -> None:
    """Wrappers that shard or synchronise act on the call of the model; the loss is inside it."""
    seen: list[dict[str, Any]] = []

    class Spy(nn.Module):
        def forward(self, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
            seen.append(options)
            return torch.tensor(3.5)

    data = batch()
    assert LMObjective(chunk=5)(Spy(), data).loss_sum == 3.5
    [options] = seen
    assert options["labels_M"] is data.labels_BT
    assert options["loss_chunk"] == 5


def test_positions_of_packed_examples_reach_the_model() -> None:
    seen: dict[str, Any] = {}

    class Spy(nn.Module):
        def forward(self, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
            seen.update(options)
            return torch.zeros(*tokens_BT.shape, 32)

    data = batch(docs=True)
    data = TokenBatch(data.tokens_BT, data.labels_BT, data.doc_ids_BT, torch.arange(8).expand(3, 8))
    LMObjective()(Spy(), data)
    assert seen["pos_BT"] is data.pos_BT
    assert seen["doc_ids_BT"] is data.doc_ids_BT


def test_balance_loss_is_weighted_by_units(make_model: Models) -> None:
    model = make_model(moe={"n_experts": 4, "top_k": 2, "balance_coef": 0.5}, dropout=0.0)
    data = batch()
    objective = LMObjective()
    terms = objective(model, data)
    units, aux = objective.units(data), model.aux_loss().item()
    assert aux > 0
    assert float(terms.metrics["balance_loss"]) == pytest.approx(aux * units)
    assert float(terms.aux_sum.detach()) == pytest.approx(aux * units)
    # What is logged and checked is the cross entropy alone.
    logits = model(data.tokens_BT).detach()
    assert float(terms.loss_sum) == pytest.approx(
        reference_loss_sum(logits, data.labels_BT), rel=1e-5
    )
    load = terms.metrics["expert_load.layer.0"] / units
    assert load.shape == (4,)
    assert float(load.sum()) == pytest.approx(1.0)


def test_mean_loss_weighs_tokens_and_restores_the_mode(make_model: Models) -> None:
    model = make_model().train()
    batches = [batch(0, share=0.9), batch(1, share=0.1), batch(2, share=0.0)]
    scores = mean_loss(model, LMObjective(), batches, device=torch.device("cpu"))
    assert model.training
    model.eval()  # the pass itself is without dropout
    sums = [reference_loss_sum(model(b.tokens_BT).detach(), b.labels_BT) for b in batches]
    units = sum(int((b.labels_BT != -100).sum()) for b in batches)
    assert scores["loss"] == pytest.approx(sum(sums) / units, rel=1e-5)
    assert scores["units"] == units
    with pytest.raises(DataError, match="no token to score"):
        mean_loss(model, LMObjective(), batches[2:], device=torch.device("cpu"))

import itertools

import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM
from modern_llm.models.masks import Window, document_positions, visible_keys


def small(**changes: object) -> ModernDecoderLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32)
    return ModernDecoderLM(ModelConfig(**{**sizes, "init_std": 0.2, **changes})).eval()


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "doc"), [(6, 6, False), (6, 6, True), (1, 6, False), (3, 6, False)]
)
@pytest.mark.parametrize("window", [None, Window(2), Window(3, 1), Window(1, 2)])
@pytest.mark.parametrize("explicit", [False, True])
def test_rules_compose_as_written_out(
    n_queries: int, n_keys: int, window: Window | None, doc: bool, explicit: bool
) -> None:
    pad = torch.tensor([0, 2])
    pos = (torch.arange(n_keys) - pad[:, None]).clamp(min=0)
    docs = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]]) if doc else None
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(2, n_queries, n_keys, generator=rng) < 0.6 if explicit else None
    actual = visible_keys(
        pos[:, n_keys - n_queries :],
        pos,
        window=window,
        doc_ids_BS=docs,
        mask_BTS=mask,
        pad_B=pad,
    )
    for b, t, s in itertools.product(range(2), range(n_queries), range(n_keys)):
        query = n_keys - n_queries + t
        expected = s <= query and s >= pad[b].item()
        if window is not None:
            near = pos[b, query] - pos[b, s] < window.size
            expected = expected and bool(near or pos[b, s] < window.n_sinks)
        if docs is not None:
            expected = expected and bool(docs[b, query] == docs[b, s])
        if mask is not None:
            expected = expected and bool(mask[b, t, s])
        assert actual[b, t, s].item() is (expected or s == query)


def test_document_positions_restart() -> None:
    docs = torch.tensor([[5, 5, 7, 7, 7], [1, 2, 2, 1, 1]])
    assert document_positions(docs).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_equal_each_alone(position: str, window: int | None) -> None:
    changes = {"attention": "window", "window": window, "n_sinks": 1} if window else {}
    model = small(position=position, **changes)
    tokens = torch.randint(0, 23, (1, 14), generator=torch.Generator().manual_seed(0))
    docs = torch.tensor([[0] * 5 + [1] * 9])
    packed = model(tokens, doc_ids_BT=docs)
    torch.testing.assert_close(packed[:, :5], model(tokens[:, :5]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(tokens[:, 5:]), rtol=1e-4, atol=1e-5)
    assert (packed[:, 5:] - model(tokens)[:, 5:]).abs().max() > 1e-2  # the mask did something


def test_a_pair_in_one_row_equals_its_two_sequences() -> None:
    """[prompt][chosen][rejected]: rejected sees the prompt and itself, at positions after it."""
    model = small()
    rng = torch.Generator().manual_seed(0)
    prompt, chosen, rejected = (torch.randint(0, 23, (1, n), generator=rng) for n in (4, 3, 5))
    part = torch.tensor([0] * 4 + [1] * 3 + [2] * 5)
    mask = ~((part[:, None] == 2) & (part[None, :] == 1))
    pos = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]])
    row = model(torch.cat([prompt, chosen, rejected], 1), mask_BTS=mask[None], pos_BT=pos)
    first = model(torch.cat([prompt, chosen], 1))
    second = model(torch.cat([prompt, rejected], 1))
    torch.testing.assert_close(row[:, :7], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(row[:, 7:], second[:, 4:], rtol=1e-4, atol=1e-5)


def test_rows_that_may_see_nothing_are_finite() -> None:
    model = small()
    tokens = torch.randint(0, 23, (2, 6))
    out = model(tokens, mask_BTS=torch.zeros(2, 6, 6, dtype=torch.bool))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("sink", ["none", "learned"])
def test_future_tokens_change_nothing(backend: str, sink: str) -> None:
    model = small(attention_backend=backend, sink=sink)
    a = torch.randint(0, 23, (1, 8))
    b = a.clone()
    b[:, 5:] = (b[:, 5:] + 1) % 23
    torch.testing.assert_close(model(a)[:, :5], model(b)[:, :5], rtol=0, atol=1e-6)


def test_a_window_reaches_as_far_as_it_says() -> None:
    """One layer: token t sees t, t-1, t-2 and the first token, nothing else."""
    model = small(n_layers=1, attention="window", window=3, n_sinks=1)
    tokens = torch.randint(0, 23, (1, 10), generator=torch.Generator().manual_seed(3))
    base = model(tokens)[0, 9]
    for s in range(10):
        changed = tokens.clone()
        changed[0, s] = (changed[0, s] + 1) % 23
        moved = (model(changed)[0, 9] - base).abs().max().item() > 1e-5
        assert moved is (s in (0, 7, 8, 9))

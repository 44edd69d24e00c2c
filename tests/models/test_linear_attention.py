"""Linear attention against its recurrence in float64, and its parts against each other."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM
from modern_llm.models.attention import LinearAttention


def make(**changes: object) -> ModernDecoderLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, d_ff=32, max_seq_len=200)
    settings = {**sizes, "attention": "linear", "init_std": 0.3, **changes}
    return ModernDecoderLM(ModelConfig(**settings))


def recurrence(layer: LinearAttention, x_TD: Tensor, model: ModernDecoderLM) -> Tensor:
    """arXiv:2006.16236, eq. 16-20, token by token and head by head, in float64."""
    dims, out = layer.dims, []
    heads = (x_TD.double() @ layer.qkv.weight.double().T).view(len(x_TD), -1, dims.head_size)
    q, k, v = heads.split([dims.n_heads, dims.n_kv_heads, dims.n_kv_heads], 1)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    turned_q, turned_k = (
        model.position.rotate(x[None], model.position.prepare(torch.arange(len(x_TD))[None]))[0]
        for x in (q, k)
    )
    for n in range(dims.n_heads):
        g = n // (dims.n_heads // dims.n_kv_heads)
        state = torch.zeros(dims.head_size, dims.head_size, dtype=torch.float64)
        total = torch.zeros(dims.head_size, dtype=torch.float64)
        rows = []
        for t in range(len(x_TD)):
            state = state + torch.outer(turned_k[t, g], v[t, g])
            total = total + k[t, g]
            rows.append(turned_q[t, n] @ state / (q[t, n] @ total))
        out.append(torch.stack(rows))
    return torch.cat(out, 1) @ layer.out.weight.double().T


@pytest.mark.parametrize("n_tokens", [3, 64, 150])
@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_values_and_gradients_match_the_recurrence(
    n_kv_heads: int, position: str, n_tokens: int
) -> None:
    """Shorter than a chunk, one chunk, and a last chunk that is not full."""
    model = make(n_kv_heads=n_kv_heads, position=position)
    layer = model.blocks[0].attention
    x = torch.randn(1, n_tokens, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    context = model._contexts(
        torch.arange(n_tokens)[None], torch.arange(n_tokens)[None], *[None] * 4, by_index=True
    )[0]
    leaves = [x, layer.qkv.weight, layer.out.weight]
    results = []
    for out in (layer(x, context)[0], recurrence(layer, x[0], model)):
        results.append([out, *torch.autograd.grad(out.double().pow(2).sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)


def test_by_pairs_equals_by_chunks() -> None:
    model = make(n_kv_heads=2, position="rope").eval()
    tokens = torch.randint(0, 23, (2, 150), generator=torch.Generator().manual_seed(0))
    everything = torch.ones(1, 150, 150, dtype=torch.bool)
    torch.testing.assert_close(
        model(tokens, mask_BTS=everything), model(tokens), rtol=1e-4, atol=1e-4
    )


def test_documents_do_not_see_each_other() -> None:
    model = make(position="rope").eval()
    tokens = torch.randint(0, 23, (1, 12), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0] * 5 + [1] * 7])
    both = model(tokens, doc_ids_BT=ids)
    apart = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], 1)
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_its_state_does_not_grow() -> None:
    model = make().eval()
    cache = model.new_cache(1, 100)
    sizes = set()
    with torch.no_grad():
        for t in range(5):
            model(torch.tensor([[t]]), cache=cache)
            sizes.add(sum(x.numel() for pair in cache.states.values() for x in pair))
    assert sizes == {2 * 4 * (8 * 8 + 8)}


def test_rows_of_a_state_can_be_dropped() -> None:
    model = make().eval()
    tokens = torch.randint(0, 23, (3, 8), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3, 8)
    model(tokens[:, :5], cache=cache, pad_B=torch.tensor([0, 1, 2]))
    cache.keep_rows(torch.tensor([2, 0]))
    again = model(tokens[[2, 0], 5:], cache=cache)
    expected = model(tokens[[2, 0]], pad_B=torch.tensor([2, 0]))[:, 5:]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_sums_in_float32() -> None:
    model = make().eval()
    tokens = torch.randint(0, 23, (1, 190), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, 200)
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(tokens, cache=cache)
    assert all(x.dtype is torch.float32 for pair in cache.states.values() for x in pair)
    assert (near.float() - expected).abs().max() < 0.05 * expected.abs().max()

"""Cached decoding equals a full forward, for every registered combination."""

import itertools

import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models import FFNS, KERNELS, NORMS, POSITIONS, ModernDecoderLM
from modern_llm.models.kv_cache import StreamingCache

KINDS = {
    "full": {},
    "window": {"attention": "window", "window": 3},
    "window+streaming sinks": {"attention": "window", "window": 3, "n_sinks": 2},
    "learned sink": {"sink": "learned"},
    "window in some layers": {"attention": "window", "window": 3, "window_pattern": "SL"},
    "capped logits": {"softcap": 2.0},
    "linear": {"attention": "linear"},
    "window+both sinks": {"attention": "window", "window": 4, "n_sinks": 1, "sink": "learned"},
}
LINEAR = {(position, "auto") for position in POSITIONS if position != "alibi"}
COMBINATIONS = [
    combination
    for combination in itertools.product(
        POSITIONS, KINDS, KERNELS, [1, 4], ["rmsnorm"], ["swiglu"], [None]
    )
    if combination[1:3] != ("capped logits", "sdpa")  # refused, like the next
    and (combination[1] != "linear" or (combination[0], combination[2]) in LINEAR)
] + [
    *itertools.product(["rope"], ["full"], ["sdpa"], [2], NORMS, FFNS, [None, {"n_experts": 4}]),
]


def make(**changes: object) -> ModernDecoderLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, d_ff=32, max_seq_len=16)
    model = ModernDecoderLM(ModelConfig(**{**sizes, "init_std": 0.3, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("sink_N"):
            parameter.data.normal_()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("position", "kind", "kernel", "n_kv_heads", "norm", "ffn", "moe"), COMBINATIONS, ids=str
)
def test_cached_equals_full(
    position: str, kind: str, kernel: str, n_kv_heads: int, norm: str, ffn: str, moe: dict | None
) -> None:
    """A prompt at once, a chunk, then token by token; without padding, then padded on the left."""
    model = make(
        position=position,
        attention_backend=kernel,
        n_kv_heads=n_kv_heads,
        norm=norm,
        ffn=ffn,
        moe=moe,
        **KINDS[kind],
    )
    tokens = torch.randint(0, 23, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 12)
    cuts = [0, 5, 8, 9, 10, 11, 12]
    parts = [model(tokens[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)

    pads = [0, 4]
    padded = torch.stack([tokens[0], torch.cat([torch.full((4,), 9), tokens[1, :8]])])
    cache = model.new_cache(2, 12)
    first = model(padded[:, :7], cache=cache, pad_B=torch.tensor(pads))
    parts = [first, *(model(padded[:, t : t + 1], cache=cache) for t in range(7, 12))]
    cached = torch.cat(parts, 1)
    for row, pad in enumerate(pads):
        alone = model(padded[row : row + 1, pad:])
        torch.testing.assert_close(cached[row : row + 1, pad:], alone, rtol=1e-4, atol=1e-4)


def test_crop_and_keep_rows() -> None:
    model = make()
    tokens = torch.randint(0, 23, (3, 8), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3, 8)
    model(tokens, cache=cache, pad_B=torch.tensor([0, 1, 2]))
    cache.crop(5)
    cache.keep_rows(torch.tensor([2, 0]))
    again = model(tokens[[2, 0], 5:], cache=cache)
    expected = model(tokens[[2, 0]], pad_B=torch.tensor([2, 0]))[:, 5:]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_cache_refusals() -> None:
    model = make()
    cache = model.new_cache(1, 4)
    with pytest.raises(ConfigError, match="exceed the cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="positions follow"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache, pos_BT=torch.zeros(1, 2).long())
    with pytest.raises(ConfigError, match="needs attention=window"):
        model.new_streaming_cache()
    with pytest.raises(ConfigError, match="relative position"):
        make(position="learned", **KINDS["window"]).new_streaming_cache()


# Streams: text beyond max_seq_len.


def slow_stream(model: ModernDecoderLM, tokens: list[int]) -> torch.Tensor:
    """arXiv:2309.17453, sec. 3.2, with lists: one token at a time, keys without their position.

    Written apart from the model: it uses only its matrices, norms, feed-forwards and rotation.
    """
    c = model.config
    held: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in model.blocks]
    out = []
    for token in tokens:
        x = model.embedding.weight[token]
        for block, memory in zip(model.blocks, held, strict=True):
            qkv = block.attention_norm(x) @ block.attention.qkv.weight.T
            heads = qkv.view(-1, c.head_size)
            q = heads[: c.n_heads]
            k, v = heads[c.n_heads :].chunk(2)
            if len(memory) == c.window + c.n_sinks:
                del memory[c.n_sinks]
            memory.append((k, v))
            result = []
            for n in range(c.n_heads):
                g = n // (c.n_heads // c.n_kv_heads)
                query = rotated(q[n], len(memory) - 1)
                logits = torch.stack(
                    [query @ rotated(k[g], i) for i, (k, _) in enumerate(memory)]
                ) / (c.head_size**0.5)
                weights = logits.softmax(0)
                result.append(sum(w * v[g] for w, (_, v) in zip(weights, memory, strict=True)))
            x = x + torch.cat(result) @ block.attention.out.weight.T
            x = x + block.ffn(block.ffn_norm(x))
        out.append(model.final_norm(x) @ model.embedding.weight.T)
    return torch.stack(out)


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    half = x.shape[0] // 2
    angle = position * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


@pytest.mark.parametrize("n_sinks", [0, 2])
@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_stream_beyond_the_context_equals_the_slow_one(kernel: str, n_sinks: int) -> None:
    model = make(
        attention="window", window=4, n_sinks=n_sinks, n_kv_heads=2, attention_backend=kernel
    )
    tokens = torch.randint(0, 23, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = model.new_streaming_cache()
    parts, read = [], 0
    while read < 40:
        chunk = tokens[:, read : read + cache.room()]
        parts.append(model(chunk, cache=cache))
        read += chunk.shape[1]
        assert cache.length <= cache.capacity
    actual = torch.cat(parts, 1)[0]
    torch.testing.assert_close(actual, slow_stream(model, tokens[0].tolist()), rtol=1e-4, atol=1e-4)


def test_stream_equals_full_forward_while_nothing_is_evicted() -> None:
    model = make(attention="window", window=4, n_sinks=2, n_kv_heads=2)
    tokens = torch.randint(0, 23, (2, 6), generator=torch.Generator().manual_seed(0))
    cache = model.new_streaming_cache()
    parts = [model(tokens[:, :4], cache=cache), model(tokens[:, 4:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)
    kept = cache.keep_rows(torch.tensor([1]))
    assert isinstance(kept, StreamingCache)
    with pytest.raises(ConfigError, match="feed 1 at most"):
        model(tokens[1:, :2], cache=cache)
    with pytest.raises(ValueError, match="takes no positions"):
        model(tokens[1:, :1], cache=cache, pad_B=torch.tensor([0]))
    assert model(tokens[1:, :1], cache=cache).isfinite().all()

"""Windows cut in pieces: the values of all pairs under a mask, in time that grows with the text."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from modern_llm.config import ModelConfig
from modern_llm.models import KERNELS, ModernDecoderLM
from modern_llm.models.masks import Window

TRAINING = sorted(set(KERNELS) - {"flex"})  # on a CPU
BLOCK = Window(1).block
T_TOKENS = 2 * BLOCK + 45  # the last piece is not full
SIZES = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32)
PARTS: list[dict[str, Any]] = [
    {},
    {"position": "alibi"},
    {"position": "alibi", "n_sinks": 3},
    {"n_sinks": 5, "sink": "learned"},
    {"n_sinks": BLOCK + 9},  # more than a block
    {"softcap": 2.0, "qk_norm": True},
]


def make(**changes: Any) -> ModernDecoderLM:
    torch.manual_seed(0)
    settings = {**SIZES, "max_seq_len": 2 * T_TOKENS, "init_std": 0.3, **changes}
    model = ModernDecoderLM(ModelConfig(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith("sink_N"):
            parameter.data.normal_()
    return model.eval()


def windowed(window: int, **changes: Any) -> ModernDecoderLM:
    return make(attention="window", window=window, **changes)


def some_tokens(rows: int, n_tokens: int = T_TOKENS) -> Tensor:
    return torch.randint(0, 23, (rows, n_tokens), generator=torch.Generator().manual_seed(0))


def written_out(window: int, n_sinks: int, n_tokens: int = T_TOKENS) -> Tensor:
    """Bool ``(1, T, T)``, pair by pair."""
    seen = [
        [s <= t and (t - s < window or s < n_sinks) for s in range(n_tokens)]
        for t in range(n_tokens)
    ]
    return torch.tensor(seen)[None]


def with_gradients(model: ModernDecoderLM, forward: Callable[[], Tensor]) -> list[Tensor]:
    out = forward()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).mean(), list(model.parameters()))]


def all_pairs(window: int, n_sinks: int = 0, **changes: Any) -> list[Tensor]:
    """The manual kernel over every pair, in float64: full attention under the mask, written out."""
    model = make(attention_backend="manual", **changes).double()
    mask = written_out(window, n_sinks)
    return with_gradients(model, lambda: model(some_tokens(2), mask_BTS=mask))


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("window", [1, 20, BLOCK, BLOCK + 1, T_TOKENS - 30 - BLOCK])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pieces_equal_all_pairs(window: int, dtype: torch.dtype, parts: dict[str, Any]) -> None:
    """Smaller than a block, equal and larger; values and all gradients; ``blocks`` and manual."""
    expected = all_pairs(window, **parts)
    for kernel in ("blocks", "manual"):
        model = windowed(window, attention_backend=kernel, **parts).to(dtype)
        actual = with_gradients(model, lambda model=model: model(some_tokens(2)))
        near = {"rtol": 1e-9, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-3}
        for a, e in zip(actual, expected, strict=True):
            if dtype is torch.float32:
                near["atol"] = 1e-5 * e.abs().max().item()
            torch.testing.assert_close(a.double(), e, **near)


@pytest.mark.parametrize("sink", ["none", "learned"])
@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_every_kernel_takes_pieces(kernel: str, sink: str) -> None:
    model = windowed(20, n_sinks=2, sink=sink, attention_backend=kernel).requires_grad_(False)
    actual = model(some_tokens(2)).double()
    expected = all_pairs(20, n_sinks=2, sink=sink)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kernel", ["auto", "blocks"])
def test_bfloat16_errs_no_more_than_all_pairs(kernel: str) -> None:
    """Errors of values and gradients against float64, with pieces and with all pairs, in norm."""
    model = windowed(20, n_sinks=2, attention_backend=kernel)
    everything = torch.ones(1, T_TOKENS, T_TOKENS, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        pieces = with_gradients(model, lambda: model(some_tokens(2)))
        pairs = with_gradients(model, lambda: model(some_tokens(2), mask_BTS=everything))
    for a, other, exact in zip(pieces, pairs, all_pairs(20, n_sinks=2), strict=True):
        assert (a - exact).norm() < 1.2 * (other - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("pattern", ["SL", "SSL"])
def test_patterns_over_layers(pattern: str, position: str) -> None:
    """A mask that hides nothing leads past the pieces, to all pairs of every layer."""
    changes = {"window_pattern": pattern, "n_layers": 3, "position": position}
    models = [windowed(20, attention_backend=k, **changes).double() for k in ("blocks", "manual")]
    everything = torch.ones(1, T_TOKENS, T_TOKENS, dtype=torch.bool)
    cut = with_gradients(models[0], lambda: models[0](some_tokens(2)))
    pairs = with_gradients(models[1], lambda: models[1](some_tokens(2), mask_BTS=everything))
    for actual, expected in zip(cut, pairs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    unlike = windowed(20, **{**changes, "window_pattern": "S"}).double()
    assert (unlike(some_tokens(2)) - cut[0]).abs().max() > 1e-3


@pytest.mark.parametrize("n_sinks", [0, 2])
@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_packed_documents_equal_each_alone(position: str, n_sinks: int) -> None:
    model = windowed(20, n_sinks=n_sinks, position=position, attention_backend="blocks").double()
    lengths = [70, BLOCK, 2 * BLOCK]  # their borders lie differently in the pieces between
    tokens = some_tokens(1, sum(lengths))
    docs = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    alone = torch.cat([model(part) for part in tokens.split(lengths, 1)], 1)
    torch.testing.assert_close(model(tokens, doc_ids_BT=docs), alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n_sinks", [0, 2])
def test_positions_of_the_caller_are_followed(n_sinks: int) -> None:
    """[prompt][chosen][rejected]: what is next to the prompt by position is far off by index."""
    model = windowed(20, n_sinks=n_sinks, attention_backend="blocks").double()
    lengths = [30, BLOCK, 40]
    prompt, chosen, rejected = some_tokens(1, sum(lengths)).split(lengths, 1)
    part = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = ~((part[:, None] == 2) & (part[None, :] == 1))
    pos = torch.cat([torch.arange(30 + BLOCK), torch.arange(30, 70)])[None]
    row = model(torch.cat([prompt, chosen, rejected], 1), mask_BTS=mask[None], pos_BT=pos)
    second = model(torch.cat([prompt, rejected], 1))
    torch.testing.assert_close(row[:, -40:], second[:, -40:], rtol=1e-9, atol=1e-10)
    ahead = torch.arange(30 + BLOCK)[None] // 2  # two tokens a position: the window has 40
    everything = torch.ones(1, 30 + BLOCK, 30 + BLOCK, dtype=torch.bool)
    tokens = torch.cat([prompt, chosen], 1)
    torch.testing.assert_close(
        model(tokens, pos_BT=ahead), model(tokens, pos_BT=ahead, mask_BTS=everything)
    )


@pytest.mark.parametrize("n_sinks", [0, 3])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_cached_decoding_equals_all_pairs(position: str, n_sinks: int) -> None:
    """A long prompt, chunks across the pieces, single tokens; then padded on the left."""
    parts = {"position": position, "n_sinks": n_sinks}
    model = windowed(20, attention_backend="blocks", **parts).double()
    expected = all_pairs(20, **parts)[0]
    tokens = some_tokens(2)
    cuts = [0, BLOCK + 7, BLOCK + 8, 2 * BLOCK + 3, *range(2 * BLOCK + 40, T_TOKENS + 1)]
    with torch.no_grad():
        cache = model.new_cache(2, T_TOKENS)
        parts_read = [model(tokens[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
        torch.testing.assert_close(torch.cat(parts_read, 1), expected, rtol=1e-9, atol=1e-10)
        pads, width = [0, 30], T_TOKENS + 10
        padded = torch.zeros(2, width, dtype=torch.long)
        rows = [some_tokens(1, width - pad)[0] for pad in pads]
        for row, pad in enumerate(pads):
            padded[row, pad:] = rows[row]
        cache = model.new_cache(2, width)
        cuts = [0, BLOCK + 7, 2 * BLOCK + 3, *range(width - 5, width + 1)]
        steps = [
            model(padded[:, a:b], cache=cache, pad_B=torch.tensor(pads))
            for a, b in itertools.pairwise(cuts)
        ]
        for row, pad in enumerate(pads):
            alone = model(rows[row][None])[0]
            torch.testing.assert_close(torch.cat(steps, 1)[row, pad:], alone, rtol=1e-9, atol=1e-10)


def test_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    layer = (
        windowed(4, dropout=0.5, attention_backend="blocks", position="none").blocks[0].attention
    )
    model = windowed(4, position="none")
    x_BTD = torch.randn(1, BLOCK + 3, 32)
    pos = torch.arange(BLOCK + 3)[None]
    context = model._contexts(pos, pos, *[None] * 4, by_index=True)[0]
    assert len(context.pieces) == 2
    with torch.no_grad():
        expected = layer(x_BTD, context)
        layer.train()
        draws = torch.stack([layer(x_BTD, context) for _ in range(1000)])
    assert draws.std(0).mean() > 0.1 * expected.std()
    assert (draws.mean(0) - expected).norm() < 0.1 * expected.norm()


def test_pieces_compile_into_one_graph() -> None:
    torch._dynamo.reset()
    model = windowed(20, n_sinks=2, window_pattern="SL")
    expected = with_gradients(model, lambda: model(some_tokens(2)))
    model.compile(fullgraph=True, backend="aot_eager")
    actual = with_gradients(model, lambda: model(some_tokens(2)))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


# What it costs.


class Elements(TorchDispatchMode):
    """Counts the elements of every tensor that an operator returns."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.total += x.numel() if isinstance(x, Tensor) else 0
        return out


def spent(kernel: str, n_tokens: int, **changes: Any) -> tuple[float, float, int]:
    """FLOPs forward, FLOPs and elements forward and backward, on the meta device."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # the others hide their products
        model = make(attention_backend=kernel, max_seq_len=4096, n_layers=1, **changes)
        tokens = torch.zeros(1, n_tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(tokens)
        with FlopCounterMode(display=False) as both, Elements() as elements:
            model(tokens).sum().backward()
    return forward.get_total_flops(), both.get_total_flops(), elements.total


@pytest.mark.parametrize("window", [64, 256])
@pytest.mark.parametrize("parts", [{}, {"position": "alibi"}, {"n_sinks": 4, "sink": "learned"}])
@pytest.mark.parametrize("kernel", TRAINING)
def test_work_grows_linearly(kernel: str, parts: dict[str, Any], window: int) -> None:
    """Each further token costs the same: FLOPs exactly so, elements of all tensors nearly so."""
    changes = {"attention": "window", "window": window, **parts}
    short, middle, long = (spent(kernel, n, **changes) for n in (1024, 2048, 4096))
    for s, m, x in zip(short[:2], middle[:2], long[:2], strict=True):
        assert x - m == 2 * (m - s)
    assert long[2] - middle[2] < 2.01 * (middle[2] - short[2])
    full = [
        spent(kernel, n, **{k: v for k, v in parts.items() if k != "n_sinks"}) for n in (2048, 4096)
    ]
    assert long[0] < 0.5 * full[1][0]  # ... and not so without a window
    assert full[1][0] > 2.5 * full[0][0]


def test_work_of_linear_attention_grows_linearly() -> None:
    short, middle, long = (spent("auto", n, attention="linear") for n in (1024, 2048, 4096))
    for s, m, x in zip(short, middle, long, strict=True):
        assert x - m == 2 * (m - s)


@pytest.mark.parametrize("n_sinks", [0, 4])
@pytest.mark.parametrize(("window", "n_tokens"), [(64, 1000), (256, 2048), (700, 2000), (64, 64)])
@pytest.mark.parametrize("kernel", TRAINING)
def test_cost_counts_the_keys_of_the_pieces(
    kernel: str, window: int, n_tokens: int, n_sinks: int
) -> None:
    changes = {"attention": "window", "window": window, "n_sinks": n_sinks}
    forward, both, _ = spent(kernel, n_tokens, **changes)
    with torch.device("meta"):
        model = make(attention_backend=kernel, max_seq_len=4096, n_layers=1, **changes)
    cost = model.cost(n_tokens)
    assert cost.flops_per_token_forward * n_tokens == pytest.approx(forward, rel=0.01)
    assert cost.flops_per_token_training * n_tokens == pytest.approx(both, rel=0.01)
    keys = cost.parts["attention"] / (4 * 32)
    assert keys <= window + n_sinks + Window(window).block


def test_a_decoded_token_reads_the_window_only() -> None:
    def flops_of_the_next(length: int) -> int:
        model = windowed(20, n_sinks=3).requires_grad_(False)
        cache = model.new_cache(1, length + 1)
        model(some_tokens(1, length), cache=cache)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(some_tokens(1, 1), cache=cache)
        return counter.get_total_flops()

    assert flops_of_the_next(100) == flops_of_the_next(500) < 1.2 * flops_of_the_next(10)

"""Long texts read and written through a cache: losses by position, times, attention on sinks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.evaluation.likelihood import evaluating
from modern_llm.models.decoder import Cache, ModernDecoderLM
from modern_llm.models.generate import Sampling
from modern_llm.models.kernels import Kernel
from modern_llm.models.kv_cache import StreamingCache

CHUNK = 32  # tokens of a forward while the cache has room


def hidden_states(model: ModernDecoderLM, tokens_BT: Tensor, cache: Cache) -> Iterator[Tensor]:
    """Hidden states ``(B, t, D)`` of the text in pieces, each token by what the cache then holds.

    Beyond the capacity of a `StreamingCache` a piece is one token: what is evicted is evicted
    token by token.
    """
    read, n_tokens = 0, tokens_BT.shape[1]
    while read < n_tokens:
        room = cache.room() if isinstance(cache, StreamingCache) else n_tokens
        piece_BT = tokens_BT[:, read : read + min(room, CHUNK)]
        yield model.hidden(piece_BT, cache=cache)
        read += piece_BT.shape[1]


def position_nats(model: ModernDecoderLM, tokens_BT: Tensor, cache: Cache) -> Tensor:
    """Loss of each token but the first by what came before: ``(B, T - 1)`` float64 on the CPU.

    Args:
        model: the decoder; its ``max_seq_len`` bounds a `KVCache` alone.
        tokens_BT: texts of one length.
        cache: empty.
    """
    nats: list[Tensor] = []
    read = 1
    with evaluating(model):
        for hidden_BTD in hidden_states(model, tokens_BT[:, :-1], cache):
            logits_BTV = model.logits(hidden_BTD).float()
            target_BT = tokens_BT[:, read : read + logits_BTV.shape[1]]
            read += logits_BTV.shape[1]
            loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
            nats.append(loss_BT.double().cpu())
    return torch.cat(nats, 1)


def cache_bytes(model: ModernDecoderLM, n_held: int) -> int:
    """Bytes of keys and values of ``n_held`` tokens of one text."""
    config, itemsize = model.config, model.embedding.weight.element_size()
    return 2 * config.n_layers * config.n_kv_heads * config.head_size * n_held * itemsize


def compose(
    model: ModernDecoderLM,
    prompt: Sequence[int],
    n_tokens: int,
    cache: Cache,
    *,
    sampling: Sampling,
    seed: int,
) -> tuple[list[int], list[float]]:
    """``n_tokens`` new tokens and the seconds that each took; nothing ends the text early.

    On a CPU these are seconds of this thread at work, which others on the machine hardly change.
    """
    device = model.embedding.weight.device
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    generator = torch.Generator().manual_seed(seed)
    uniform_T = torch.rand(n_tokens, dtype=torch.float64, generator=generator).to(device)
    tokens: list[int] = []
    seconds: list[float] = []
    fed_BT = torch.tensor([list(prompt)], device=device)
    with evaluating(model):
        for step in range(n_tokens):
            start = clock()
            *_, hidden_BTD = hidden_states(model, fed_BT, cache)
            next_B = sampling.draw(model.logits(hidden_BTD[:, -1]), uniform_T[step : step + 1])
            tokens.append(int(next_B))  # waits for the device
            seconds.append(clock() - start)
            fed_BT = next_B[:, None]
    return tokens, seconds


class _Probe:
    """A kernel that also notes where attention goes, by the same kernel on values that mark it."""

    def __init__(self, kernel: Kernel, n_first: int) -> None:
        self.kernel, self.n_first = kernel, n_first
        self.seen: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        marks = torch.zeros_like(v)
        marks[:, :, : self.n_first, 0] = 1
        marks[..., 1] = 1
        self.seen.append(self.kernel(q, k, marks, bias, **how)[..., :2])
        return self.kernel(q, k, v, bias, **how)


@contextmanager
def _probed(model: ModernDecoderLM, n_first: int) -> Iterator[list[_Probe]]:
    attentions: list[Any] = [block.attention for block in model.blocks]
    before = [attention.kernel for attention in attentions]
    probes = [_Probe(kernel, n_first) for kernel in before]
    for attention, probe in zip(attentions, probes, strict=True):
        attention.kernel = probe
    try:
        yield probes
    finally:
        for attention, kernel in zip(attentions, before, strict=True):
            attention.kernel = kernel


def attention_shares(
    model: ModernDecoderLM, tokens_BT: Tensor, *, n_first: int
) -> dict[str, float | None]:
    """Where the attention of the second half of each text goes.

    Args:
        model: with softmax attention.
        tokens_BT: no longer than ``max_seq_len``.
        n_first: tokens that count as the first.

    Returns:
        ``first``: mean over heads and layers of the share on the ``n_first`` first tokens;
        ``first_max``: the same of the head with most; ``even``: what they would get if all keys
        got the same (these are None where a window hides the first tokens); ``learned``: mean
        share on learned sinks.
    """
    n_tokens = tokens_BT.shape[1]
    half = n_tokens // 2
    with evaluating(model), _probed(model, n_first) as probes:
        model.hidden(tokens_BT)
    shares_LN2 = torch.stack([p.seen[0][:, :, half:].double().mean((0, 2)) for p in probes]).cpu()
    first_LN, real_LN = shares_LN2.unbind(-1)
    visible = model.window is None
    even = sum(n_first / (t + 1) for t in range(half, n_tokens)) / (n_tokens - half)
    return {
        "first": float(first_LN.mean()) if visible else None,
        "first_max": float(first_LN.max()) if visible else None,
        "even": even if visible else None,
        "learned": float(1 - real_LN.mean()),
    }

"""Batched sampling with a cache of keys and values."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modern_llm.errors import ConfigError
from modern_llm.models.decoder import Cache, ModernDecoderLM
from modern_llm.runtime.logs import counted

DEFAULT_BATCH_SIZE = 128  # rows; more only costs memory on a CPU
DROP_SHARE = 0.25  # finished rows leave the batch when they are this share of it


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with.

    Attributes:
        tokens: new tokens, without EOS.
        finished: True when it ended with EOS, False when it ran out of tokens.
        first_token_s: from the start of its batch, whose prompts are read first, to its first
            token.
    """

    tokens: list[int]
    finished: bool
    first_token_s: float = field(compare=False)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keeps the k likeliest (ties included); 0 = off, more than the vocabulary = all.
        top_p: keeps the likeliest tokens whose probabilities first sum to this (arXiv:1904.09751).
        n_vocab: ids from here on are never drawn; None = all are real.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    n_vocab: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature} must be 0 or more")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1 (off)")
        if problems:
            raise ConfigError("; ".join(problems))

    def draw(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """Next ids ``(B,)``: row b is where its distribution passes ``uniform_B[b]`` in [0, 1).

        One random number a row, all rows at once: rows cannot disturb each other.
        """
        logits_BV = logits_BV[:, : self.n_vocab].float()
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV / self.temperature
        if 0 < self.top_k < logits_BV.shape[1]:
            least_B1 = logits_BV.topk(self.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
        prob_BV = logits_BV.softmax(-1, dtype=torch.float64)
        if self.top_p < 1:
            sorted_BV, id_BV = prob_BV.sort(descending=True, stable=True)
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p
            prob_BV = prob_BV.masked_fill(beyond_BV.gather(1, id_BV.argsort(1)), 0.0)
        sum_BV = prob_BV.cumsum(-1)
        drawn_B1 = torch.searchsorted(sum_BV, uniform_B[:, None] * sum_BV[:, -1:], right=True)
        return drawn_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)


@torch.no_grad()
def generate(
    model: ModernDecoderLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    n_vocab: int | None = None,
    batch_size: int | None = None,
) -> list[Completion]:
    """Continue each prompt; a row depends on its prompt and its seed, not on its neighbours.

    A row stops at EOS, after ``max_new_tokens``, or at the model's ``max_seq_len``; with a window
    and relative positions it streams on beyond that (`StreamingCache`). Equal prompts are read
    once. Runs in the dtype of the caller's autocast, in eval mode; the mode is put back.

    Args:
        model: the decoder.
        prompts: token ids, at least one each.
        max_new_tokens: at most this many new tokens a row.
        eos_id: ends a row; None = nothing does.
        temperature: as in `Sampling`, like the next two and ``n_vocab``.
        top_k: see there.
        top_p: see there.
        seeds: one a prompt, for a temperature above 0; default: the index of the prompt.
        n_vocab: see there; a tokenizer's size when the embedding has more rows.
        batch_size: rows at a time; default 128.

    Returns:
        One `Completion` a prompt, in order.

    Raises:
        ConfigError: an option out of range, an empty prompt, or one that fills the context.
    """
    sampling = Sampling(temperature, top_k, top_p, n_vocab)
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one each")
    limit = model.config.max_seq_len
    _check_prompts(prompts, None if model.streams else limit)
    batches = _plan(prompts, limit - max_new_tokens if model.streams else None, batch_size)
    completions: dict[int, Completion] = {}
    was_training = model.training
    model.eval()
    try:
        for rows, streaming in counted(batches, "sampling, batches", len(batches)):
            uniform_BT = _uniforms([seeds[i] for i in rows], max_new_tokens, model)
            group = [prompts[i] for i in rows]
            done = _complete(model, group, sampling, uniform_BT, eos_id, streaming)
            completions.update(zip(rows, done, strict=True))
    finally:
        model.train(was_training)
    return [completions[i] for i in range(len(prompts))]


def _check_prompts(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Refuse empty prompts, and those that leave no room in a context of ``limit`` tokens."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} is empty; it needs one token at least")
        if limit is not None and len(prompt) >= limit:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens and leaves no room in the context of "
                f"max_seq_len={limit}"
            )


def _plan(
    prompts: Sequence[Sequence[int]], fits: int | None, batch_size: int | None
) -> list[tuple[list[int], bool]]:
    """Indices of the prompts of each batch, and whether it streams.

    Neighbours of like length need little padding, and equal prompts meet in one batch. Prompts
    of more than ``fits`` tokens stream; a streaming batch has no padding.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    groups: dict[int, list[int]] = {}
    for i in order:
        length = len(prompts[i])
        groups.setdefault(length if fits is not None and length > fits else -1, []).append(i)
    size = batch_size or DEFAULT_BATCH_SIZE
    return [
        (rows[start : start + size], length >= 0)
        for length, rows in groups.items()
        for start in range(0, len(rows), size)
    ]


def _uniforms(seeds: Sequence[int], n_tokens: int, model: ModernDecoderLM) -> Tensor:
    """Random numbers in [0, 1) of each row, ``(B, n_tokens)`` float64, each row by its seed."""
    rows = [
        torch.rand(n_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows).to(model.embedding.weight.device)


def _prefill(
    model: ModernDecoderLM, prompts: list[Sequence[int]], n_new: int, streaming: bool
) -> tuple[Cache, Tensor]:
    """Cache after the prompts, and the last hidden state ``(B, D)`` of each row.

    Each different prompt is read once, padded on the left.
    """
    device = model.embedding.weight.device
    index = {tuple(prompt): -1 for prompt in prompts}
    index = {prompt: i for i, prompt in enumerate(index)}
    longest = max(map(len, index))
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in index]
    tokens_BT = torch.tensor(padded, device=device)
    if streaming:
        stream = model.new_streaming_cache()
        cache: Cache = stream
        read = 0
        while read < longest:
            chunk = tokens_BT[:, read : read + stream.room()]
            hidden_BTD = model.hidden(chunk, cache=stream)
            read += chunk.shape[1]
    else:
        cache = model.new_cache(len(index), longest + n_new)
        pads = [longest - len(prompt) for prompt in index]
        pad_B = torch.tensor(pads, device=device) if any(pads) else None
        hidden_BTD = model.hidden(tokens_BT, cache=cache, pad_B=pad_B)
    rows_B = torch.tensor([index[tuple(prompt)] for prompt in prompts], device=device)
    if len(index) < len(prompts):
        cache.keep_rows(rows_B)
    return cache, hidden_BTD[rows_B, -1]


def _complete(
    model: ModernDecoderLM,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    uniform_BT: Tensor,
    eos_id: int | None,
    streaming: bool,
) -> list[Completion]:
    """Continue one batch."""
    begin, first_s = time.perf_counter(), math.nan
    n_rows, n_new = uniform_BT.shape
    limit = model.config.max_seq_len
    rooms = [n_new if streaming else min(n_new, limit - len(prompt)) for prompt in prompts]
    cache, hidden_BD = _prefill(model, prompts, max(rooms), streaming)
    room_B = torch.tensor(rooms, device=hidden_BD.device)
    out_BT = torch.full((n_rows, n_new), -1, device=hidden_BD.device)
    rows_B = torch.arange(n_rows, device=hidden_BD.device)  # rows still in the batch
    done_B = torch.zeros_like(rows_B, dtype=torch.bool)
    for step in range(max(rooms)):
        next_B = sampling.draw(model.logits(hidden_BD), uniform_BT[:, step])
        out_BT[rows_B, step] = next_B
        if eos_id is not None:
            done_B |= next_B == eos_id
        if step + 1 >= min(rooms):
            done_B |= room_B <= step + 1
        n_done = int(done_B.sum())  # waits for the device, so the time of the first is a true one
        if step == 0:
            first_s = time.perf_counter() - begin
        if n_done == len(rows_B):
            break
        if n_done >= DROP_SHARE * len(rows_B):
            alive = (~done_B).nonzero().squeeze(1)
            cache.keep_rows(alive)
            rows_B, next_B, room_B = rows_B[alive], next_B[alive], room_B[alive]
            uniform_BT, done_B = uniform_BT[alive], done_B[alive]
        hidden_BD = model.hidden(next_B[:, None], cache=cache)[:, -1]
    rows = [row[:room] for row, room in zip(out_BT.tolist(), rooms, strict=True)]
    return [
        Completion(row[: row.index(eos_id)], True, first_s)
        if eos_id in row
        else Completion(row, False, first_s)
        for row in rows
    ]

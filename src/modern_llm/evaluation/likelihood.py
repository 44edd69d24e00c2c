"""Log-likelihoods of token spans under a causal model, batched, summed in float64."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.data.templates import truncate_prompt
from modern_llm.evaluation.intervals import Floats, bootstrap
from modern_llm.evaluation.scores import NotEvaluated, Result, Score
from modern_llm.runtime.devices import autocast

_BUFFERED_BATCHES = 16  # spans are sorted by length within this many batches: less padding


class TextTokenizer(Protocol):
    """What evaluation needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """Id that stands before a text, if there is one."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids."""


@dataclass(frozen=True)
class Compute:
    """Where and how an evaluation computes."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 8  # rows of one forward
    precision: str = "fp32"  # of the forward; sums are always float64


@dataclass(frozen=True)
class Span:
    """Tokens of one forward; the last ``n_scored`` are scored, all before them are context."""

    tokens: Sequence[int]
    n_scored: int


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def span_nats(model: nn.Module, spans: Iterable[Span], compute: Compute) -> Iterator[float]:
    """Negative log-likelihood of the scored tokens of each span, in nats, in order.

    Spans stream: memory is bounded by sixteen batches. Padding goes to the right, where a causal
    model cannot see it; logits are computed for scored positions only.

    Args:
        model: called as ``model(tokens_BT, at_M=flat_indices)``, returns logits ``(M, V)``.
        spans: each has at least one token before the scored ones.
        compute: device, batch size, precision.
    """
    stream = iter(spans)
    with evaluating(model):
        while buffer := list(islice(stream, compute.batch_size * _BUFFERED_BATCHES)):
            order = sorted(range(len(buffer)), key=lambda i: -len(buffer[i].tokens))
            nats = [0.0] * len(buffer)
            for at in range(0, len(order), compute.batch_size):
                rows = order[at : at + compute.batch_size]
                batch_nats = _batch_nats(model, [buffer[i] for i in rows], compute)
                for i, value in zip(rows, batch_nats, strict=True):
                    nats[i] = value
            yield from nats


def _batch_nats(model: nn.Module, spans: list[Span], compute: Compute) -> list[float]:
    length = max(len(span.tokens) for span in spans) - 1
    tokens_BT = torch.zeros(len(spans), length, dtype=torch.int64)
    at: list[Tensor] = []
    targets: list[Tensor] = []
    for row, span in enumerate(spans):
        ids = torch.as_tensor(span.tokens, dtype=torch.int64)
        if not 0 < span.n_scored < len(ids):
            raise ValueError(f"{span.n_scored} scored tokens in a span of {len(ids)}")
        tokens_BT[row, : len(ids) - 1] = ids[:-1]
        end = row * length + len(ids) - 1
        at.append(torch.arange(end - span.n_scored, end))
        targets.append(ids[-span.n_scored :])
    with autocast(compute.device, compute.precision):
        logits_MV = model(tokens_BT.to(compute.device), at_M=torch.cat(at).to(compute.device))
    target_M = torch.cat(targets).to(compute.device)
    nats_M = F.cross_entropy(logits_MV.float(), target_M, reduction="none").double().cpu()
    parts = torch.split(nats_M, [span.n_scored for span in spans])
    return [float(part.sum()) for part in parts]


def answer_nats(
    model: nn.Module,
    rows: Iterable[tuple[Sequence[int], Sequence[int]]],
    compute: Compute,
    *,
    max_tokens: int,
) -> Iterator[float]:
    """Negative log-likelihood in nats of each answer given its prompt, both as token ids.

    A prompt that does not fit is cut from its start (its two opening markers stay); an answer
    that does not fit behind three prompt tokens is cut at its end.

    Args:
        model: as in `span_nats`.
        rows: ``(prompt, answer)``; neither is empty.
        compute: device, batch size, precision.
        max_tokens: longest input of the model.
    """

    def spans() -> Iterator[Span]:
        for prompt, answer in rows:
            kept = list(answer)[: max_tokens - 2]
            room = max_tokens + 1 - len(kept)  # the last token is predicted, never fed
            yield Span(truncate_prompt(list(prompt), room) + kept, len(kept))

    yield from span_nats(model, spans(), compute)


def answer_bits_per_byte(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    n_bytes: Sequence[int],
    compute: Compute,
    *,
    key: str,
    max_tokens: int,
) -> Result:
    """Bits per byte of given answers: their negative log-likelihood over their UTF-8 bytes.

    Args:
        model: as in `span_nats`.
        rows: ``(prompt, answer)`` as token ids; EOS belongs to an answer when it is to be scored.
        n_bytes: bytes of each answer's text, EOS not counted.
        compute: device, batch size, precision.
        key: of the result.
        max_tokens: longest input of the model.
    """
    if not sum(n_bytes):
        return NotEvaluated(f"{key} bits_per_byte", "there are no answers")
    nats = list(answer_nats(model, rows, compute, max_tokens=max_tokens))
    columns = np.stack([nats, np.asarray(n_bytes, dtype=np.float64)], axis=1)

    def bits(sums: Floats) -> Floats:
        return np.asarray(sums[:, 0] / sums[:, 1] / math.log(2), dtype=np.float64)

    value = float(bits(columns.sum(axis=0, keepdims=True))[0])
    note = "answers given their prompts; bootstrap over answers"
    return Score(key, "bits_per_byte", value, bootstrap(columns, bits), len(nats), note)

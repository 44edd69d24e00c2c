"""Perplexity of texts: each token scored once, the protocol in the key.

Windows follow lm-evaluation-harness's ``get_rolling_token_windows``: the first window scores up to
``context`` tokens, each later one the next ``stride`` tokens with the ``context - stride + 1``
tokens before them in view; the last window is aligned to the end of the text, so that it
is never shorter than the context allows. ``stride = context`` is the harness's own setting.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from modern_llm.errors import ConfigError, DataError
from modern_llm.evaluation.intervals import Floats, bootstrap
from modern_llm.evaluation.likelihood import Compute, Span, TextTokenizer, span_nats
from modern_llm.evaluation.scores import Interval, Score
from modern_llm.evaluation.wikitext import count_words
from modern_llm.runtime.logs import counted

UNKNOWN_WORD = "<unk>"


@dataclass
class Tally:
    """Sums of one document.

    Attributes:
        index: number of the document among the texts, from 0.
        nats: negative log-likelihood of its scored tokens.
        tokens: scored tokens.
        words: pieces between white space, as lm-evaluation-harness counts them.
        bytes: UTF-8 bytes.
    """

    index: int
    nats: float = 0.0
    tokens: int = 0
    words: int = 0
    bytes: int = 0


@dataclass
class TextTallies:
    """Sums of all documents, and of each window of the first."""

    key: str
    documents: list[Tally] = field(default_factory=list)
    first_windows: list[tuple[float, int]] = field(default_factory=list)  # (nats, tokens)
    note: str = ""


def windows(tokens: Sequence[int], *, context: int, stride: int) -> Iterator[Span]:
    """Spans that score each token but the first exactly once.

    Args:
        tokens: ids of a text, the first of them context only (BOS where there is one).
        context: longest input of the model in tokens.
        stride: tokens scored a window after the first; at most ``context``.
    """
    last = len(tokens) - 1  # index of the last token
    done = 0  # index of the last scored token
    while done < last:
        end = min(done + (stride if done else context), last)
        yield Span(tokens[max(0, end - context) : end + 1], end - done)
        done = end


def perplexity(
    model: nn.Module,
    tokenizer: TextTokenizer,
    texts: Iterable[str],
    *,
    key: str,
    context: int,
    stride: int | None = None,
    compute: Compute | None = None,
    detokenize: Callable[[str], str] | None = None,
) -> list[Score]:
    """Token perplexity, word perplexity and bits per byte of texts (documents, pages).

    Context never crosses from one text to the next. The texts stream: one is held at a time.
    Word perplexity is ``exp(nats / words)`` with the words of the text as given, split at white
    space; bits per byte divides by its UTF-8 bytes. Both compare across tokenizers, token
    perplexity does not.

    Args:
        model: called as ``model(tokens_BT, at_M=flat_indices)``.
        tokenizer: its BOS, if any, is the context of each text's first token; without one the
            first token is not scored (``nobos`` in the key).
        texts: documents; empty ones are skipped.
        key: name of the text, e.g. ``wikitext2.test``; the protocol is appended.
        context: longest input in tokens.
        stride: tokens scored a window; default ``context``.
        compute: device, batch size, precision.
        detokenize: what is scored is ``detokenize(text)``, still divided by words and bytes of
            the text as given (the harness's ``wikitext``); the key then says ``lm-eval``.

    Raises:
        ConfigError: ``stride`` is not in 1..context.
        DataError: no token to score.
    """
    return scores_of(
        tally_texts(
            model,
            tokenizer,
            texts,
            key=key,
            context=context,
            stride=stride,
            compute=compute,
            detokenize=detokenize,
        )
    )


def tally_texts(
    model: nn.Module,
    tokenizer: TextTokenizer,
    texts: Iterable[str],
    *,
    key: str,
    context: int,
    stride: int | None = None,
    compute: Compute | None = None,
    detokenize: Callable[[str], str] | None = None,
) -> TextTallies:
    """The sums behind `perplexity`, which has the arguments."""
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ConfigError(f"perplexity: stride={stride} must be from 1 to context={context}")
    start = "nobos" if tokenizer.bos_id is None else "bos"
    protocol = f"lm-eval/ctx{context}" if detokenize else f"ctx{context}/stride{stride}"
    result = TextTallies(f"{key}/{protocol}/{start}")
    documents = result.documents
    pending: deque[tuple[int, int]] = deque()  # (document, scored tokens) of spans under way

    def spans() -> Iterator[Span]:
        for index, text in enumerate(texts):
            ids = tokenizer.encode(detokenize(text) if detokenize else text)
            tokens = ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
            if len(tokens) < 2:
                continue
            if UNKNOWN_WORD in text:
                result.note = f"text has {UNKNOWN_WORD}"
            documents.append(Tally(index, words=count_words(text), bytes=len(text.encode())))
            for span in windows(tokens, context=context, stride=stride):
                pending.append((len(documents) - 1, span.n_scored))
                yield span

    scored = span_nats(model, spans(), compute or Compute())
    for nats in counted(scored, f"{result.key}, windows"):
        at, n_scored = pending.popleft()
        documents[at].nats += nats
        documents[at].tokens += n_scored
        if at == 0:
            result.first_windows.append((nats, n_scored))
    if not documents:
        raise DataError(f"{key}: no text to score")
    return result


def scores_of(result: TextTallies) -> list[Score]:
    """The three scores, with a bootstrap over documents, or over windows of a single one."""
    tallies, first_windows = result.documents, result.first_windows
    totals = {
        "nats": math.fsum(t.nats for t in tallies),
        **{unit: sum(getattr(t, unit) for t in tallies) for unit in ("tokens", "words", "bytes")},
    }
    single = len(tallies) == 1
    if single:
        how = f"1 document; interval: bootstrap over its {len(first_windows)} windows"
    else:
        how = f"{len(tallies)} documents; interval: bootstrap over documents"
    how = "; ".join(part for part in (how, result.note) if part)

    def interval(unit: str, finish: Callable[[Floats], Floats]) -> Interval | None:
        if single:  # a window has no words or bytes of its own: share the document's
            per_token = totals[unit] / totals["tokens"]
            columns = np.array([(nats, n * per_token) for nats, n in first_windows])
        else:
            columns = np.array([(t.nats, getattr(t, unit)) for t in tallies])
        return bootstrap(columns, lambda sums: finish(sums[:, 0] / sums[:, 1]))

    rows: tuple[tuple[str, str, Callable[[Floats], Floats]], ...] = (
        ("token_perplexity", "tokens", np.exp),
        ("word_perplexity", "words", np.exp),
        ("bits_per_byte", "bytes", lambda nats: nats / math.log(2)),
    )
    results = []
    for metric, unit, finish in rows:
        with np.errstate(over="ignore"):  # a perplexity past 1e308 is inf
            value = float(finish(np.array([totals["nats"] / totals[unit]]))[0])
            ci95 = interval(unit, finish)
        results.append(Score(result.key, metric, value, ci95, int(totals[unit]), how))
    return results


def all_protocols(
    model: nn.Module,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    *,
    key: str,
    context: int,
    compute: Compute | None = None,
) -> list[Score]:
    """Scores at stride = context and at context / 2; see `perplexity` for the arguments."""
    scores: list[Score] = []
    for stride in dict.fromkeys((context, max(1, context // 2))):
        scores += perplexity(
            model, tokenizer, texts, key=key, context=context, stride=stride, compute=compute
        )
    return scores

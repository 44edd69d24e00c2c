"""Several models side by side on the same held-out texts, with paired differences.

Bits per byte and word perplexity compare across tokenizers; the differences resample the same
documents for both models, so that what is hard for both does not blur them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from modern_llm.errors import DataError
from modern_llm.evaluation.intervals import Floats, bootstrap
from modern_llm.evaluation.likelihood import Compute, TextTokenizer
from modern_llm.evaluation.perplexity import Tally, scores_of, tally_texts
from modern_llm.evaluation.scores import Score


@dataclass(frozen=True)
class Contestant:
    """One model of a comparison.

    Attributes:
        name: how it is called in the table.
        model: called as ``model(tokens_BT, at_M=flat_indices)``.
        tokenizer: its own.
        context: longest input in tokens.
    """

    name: str
    model: nn.Module
    tokenizer: TextTokenizer
    context: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds.

    Attributes:
        scores: of each contestant by name.
        differences: bits per byte of each contestant minus those of the first, paired; below zero
            is better.
        verdicts: ``better``, ``worse`` or ``not distinguishable`` from the first, by whether the
            95 % interval of the difference leaves out zero.
    """

    scores: dict[str, list[Score]] = field(default_factory=dict)
    differences: dict[str, Score] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


def compare(
    contestants: Sequence[Contestant],
    texts: Sequence[str],
    *,
    key: str,
    context: int | None = None,
    compute: Compute | None = None,
    detokenize: Callable[[str], str] | None = None,
) -> Comparison:
    """Perplexity of every contestant on the same texts, at stride = half the context.

    Args:
        contestants: at least one; the first is what the others are compared with.
        texts: documents.
        key: name of the texts.
        context: tokens in view; default: the shortest context of all contestants.
        compute: device, batch size, precision.
        detokenize: see `perplexity`; the windows then do not overlap.

    Raises:
        DataError: two contestants of one name, or nothing to score.
    """
    names = [contestant.name for contestant in contestants]
    if len(set(names)) != len(names):
        raise DataError(f"{key}: two contestants have one name ({', '.join(names)})")
    shared = min([c.context for c in contestants] + ([context] if context else []))
    stride = shared if detokenize else max(1, shared // 2)
    kept = [text for text in texts if text]
    comparison = Comparison()
    first: list[Tally] = []
    for contestant in contestants:
        tallies = tally_texts(
            contestant.model,
            contestant.tokenizer,
            kept,
            key=key,
            context=shared,
            stride=stride,
            compute=compute,
            detokenize=detokenize,
        )
        scores = scores_of(tallies)
        comparison.scores[contestant.name] = scores
        if contestant is contestants[0]:
            first = tallies.documents
            continue
        gain = _difference(first, tallies.documents, key=scores[-1].key)
        comparison.differences[contestant.name] = gain
        comparison.verdicts[contestant.name] = _verdict(gain)
    return comparison


def _difference(first: list[Tally], other: list[Tally], *, key: str) -> Score:
    """Bits per byte of ``other`` minus ``first``, over the documents that both scored."""
    theirs = {tally.index: tally for tally in other}
    pairs = [(mine, theirs[mine.index]) for mine in first if mine.index in theirs]
    columns = np.array([(b.nats - a.nats, a.bytes) for a, b in pairs], dtype=np.float64)

    def bits(sums: Floats) -> Floats:
        return np.asarray(sums[:, 0] / sums[:, 1] / math.log(2), dtype=np.float64)

    value = float(bits(columns.sum(axis=0, keepdims=True))[0])
    note = f"paired; bootstrap over {len(pairs)} documents"
    n_bytes = int(columns[:, 1].sum())
    return Score(key, "bits_per_byte - first", value, bootstrap(columns, bits), n_bytes, note)


def _verdict(difference: Score) -> str:
    if difference.ci95 is None or difference.ci95[0] <= 0 <= difference.ci95[1]:
        return "not distinguishable"
    return "better" if difference.value < 0 else "worse"

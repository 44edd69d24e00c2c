"""From sources to token stores: what is read, what is left out and counted."""

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from modern_llm.config import DataConfig
from modern_llm.data.encoders import (
    Encode,
    InstructEncoder,
    PairEncoder,
    Row,
    TextEncoder,
    prompt_of,
)
from modern_llm.data.making import current
from modern_llm.data.sources.base import RowCounts, Source
from modern_llm.data.store import TokenStore, build_from_batches, build_store, token_dtype
from modern_llm.data.templates import (
    MIN_PROMPT_TOKENS,
    TEMPLATE_HASH,
    Prompt,
    prompt_text,
    prompts_ids,
    truncate_prompt,
)
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.data.workers import BATCH_ROWS, encode_rows, grouped
from modern_llm.data.writer import Encoded, Record
from modern_llm.errors import ConfigError
from modern_llm.runtime.artifacts import sha256_json

FORMAT = 2  # raised when the same rows give other records


def text_store(
    sources: Sequence[Source],
    split: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    max_rows: int | None = None,
) -> TokenStore:
    """Pretraining documents, ``<|bos|> text <|eos|>``: segment "text".

    Args:
        sources: of kind "text"; their documents follow each other.
        split: "train", "validation" or "test".
        tokenizer: gives the ids; its hash is part of the store's key.
        data: cache folder and limit of malformed rows.
        max_rows: documents of each source at most.

    Raises:
        DataError: the data cannot be had, is malformed, or nothing is left.
        ConfigError: a source of another kind.
    """
    job = _Job("text", ("text",), sources, split, tokenizer, data, max_rows)
    return job.build(TextEncoder(tokenizer))


def instruct_store(
    sources: Sequence[Source],
    split: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    max_tokens: int,
    max_rows: int | None = None,
    exclude: Collection[str] = (),
) -> TokenStore:
    """Prompts with answers for SFT: segments "prompt" and "answer" (with ``<|eos|>``).

    A prompt is cut from its start to make room for the answer; an answer that does not fit beside
    the prompt's markers and one token of it is dropped, never cut, so that each answer ends with
    its ``<|eos|>``.

    Args:
        sources: of kind "instruct" or "problems" (question and worked answer).
        split: "train", "validation" or "test".
        tokenizer: gives the ids; its hash is part of the store's key.
        data: cache folder and limit of malformed rows.
        max_tokens: of prompt and answer together.
        max_rows: rows of each source at most.
        exclude: `prompt_hash` of prompts that are held out elsewhere.

    Raises:
        DataError: the data cannot be had, is malformed, or nothing is left.
        ConfigError: a source of another kind.
    """
    job = _Job(
        "instruct",
        ("prompt", "answer"),
        sources,
        split,
        tokenizer,
        data,
        max_rows,
        frozenset(exclude),
    )
    return job.build(InstructEncoder(tokenizer, max_tokens), max_tokens=max_tokens)


def pair_store(
    sources: Sequence[Source],
    split: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    max_prompt: int,
    max_answer: int,
    max_rows: int | None = None,
    exclude: Collection[str] = (),
) -> TokenStore:
    """Preference pairs: segments "prompt", "chosen" and "rejected" (with ``<|eos|>``).

    The prompt is cut first and from its start, then each answer to its own budget (a cut answer
    has no ``<|eos|>``). Answers that are equal after that are dropped.

    Args:
        sources: of kind "pairs".
        split: "train", "validation" or "test".
        tokenizer: gives the ids; its hash is part of the store's key.
        data: cache folder and limit of malformed rows.
        max_prompt: tokens of a prompt, markers included.
        max_answer: tokens of each answer, ``<|eos|>`` included.
        max_rows: rows of each source at most.
        exclude: `prompt_hash` of prompts that are held out elsewhere.

    Raises:
        DataError: the data cannot be had, is malformed, or nothing is left.
        ConfigError: a source of another kind, or a budget without room.
    """
    if max_answer < 2:
        raise ConfigError(f"max_answer_tokens={max_answer}: at least 2")
    segments = ("prompt", "chosen", "rejected")
    job = _Job("pairs", segments, sources, split, tokenizer, data, max_rows, frozenset(exclude))
    encode = PairEncoder(tokenizer, max_prompt, max_answer)
    return job.build(encode, max_prompt=max_prompt, max_answer=max_answer)


def solution_store(
    solutions: Iterable[tuple[str, str, float]],
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    key: dict[str, Any],
    max_tokens: int,
) -> TokenStore:
    """Graded solutions for the verifier: segments "prompt" and "answer", column "label".

    Args:
        solutions: question, solution and label (1 for right), read only when the store is built.
        tokenizer: gives the ids.
        data: cache folder.
        key: all that decides the solutions: checkpoint, problems, sampling.
        max_tokens: of question and solution together, see `solution_ids`; a solution that does
            not fit is dropped and counted.

    Raises:
        DataError: nothing is left.
    """
    counts = RowCounts()

    def records() -> Iterator[Record]:
        texts, labelled = itertools.tee(solutions)
        rows = solution_ids(tokenizer, ((q, text) for q, text, _ in texts), max_tokens=max_tokens)
        for row, (_, _, label) in zip(rows, labelled, strict=True):
            if row is None:
                counts.drop("too long")
            else:
                yield *row, label

    full = {
        "what": "solutions, long questions cut",
        "tokenizer": tokenizer.sha256,
        "template": TEMPLATE_HASH,
        "max_tokens": max_tokens,
        **key,
    }
    return build_store(
        data.cache_dir,
        segments=("prompt", "answer"),
        key=full,
        records=records(),
        n_vocab=tokenizer.n_vocab,
        pad_id=tokenizer.pad_id,
        columns=("label",),
        counts=counts,
    )


def solution_ids(
    tokenizer: Tokenizer, solutions: Iterable[tuple[str, str]], *, max_tokens: int
) -> Iterator[tuple[list[int], list[int]] | None]:
    """Ids of each question and its solution (with ``<|eos|>``), as the verifier reads them.

    A question that leaves no room for its solution is cut from its start. ``None`` stands for a
    solution that leaves no room even for the question's markers: it is never cut.
    """
    for batch in grouped(solutions, BATCH_ROWS):
        prompts = prompts_ids(tokenizer, [question for question, _ in batch])
        texts = tokenizer.encode_batch([text for _, text in batch])
        for prompt, ids in zip(prompts, texts, strict=True):
            room = max_tokens - len(ids) - 1
            fits = room >= MIN_PROMPT_TOKENS
            yield (truncate_prompt(prompt, room), [*ids, tokenizer.eos_id]) if fits else None


def prompt_hash(prompt: Prompt) -> str:
    """Hash by which equal prompts of different sources and splits are found."""
    return hashlib.sha256(prompt_text(prompt).strip().encode()).hexdigest()[:32]


def prompt_hashes(
    sources: Iterable[Source], split: str, max_rows: int | None = None
) -> frozenset[str]:
    """`prompt_hash` of every row of a split: what another split must not contain."""
    rows = (row for s in sources for row in itertools.islice(s.rows(split), max_rows))
    return frozenset(prompt_hash(prompt_of(row)) for row in rows)


class _Job:
    """Rows of some sources, encoded in batches into one store, with counts by source."""

    def __init__(
        self,
        what: str,
        segments: tuple[str, ...],
        sources: Sequence[Source],
        split: str,
        tokenizer: Tokenizer,
        data: DataConfig,
        max_rows: int | None,
        exclude: frozenset[str] = frozenset(),
    ) -> None:
        kinds = {"instruct": {"instruct", "problems"}}.get(what, {what})
        for source in sources:
            if source.kind not in kinds:
                raise ConfigError(
                    f"{source.description}: rows of kind '{source.kind}', "
                    f"needed here: {' or '.join(sorted(kinds))}"
                )
        self.what, self.segments, self.sources, self.split = what, segments, sources, split
        self.tokenizer, self.data = tokenizer, data
        self.max_rows, self.exclude = max_rows, exclude
        self.total = RowCounts(max_bad_rows=data.max_bad_rows)
        self.summaries: list[dict[str, Any]] = []

    def build(self, encode: Encode, **options: int) -> TokenStore:
        """The store for these rows and options."""
        prints = [source.fingerprint(self.split) for source in self.sources]
        key = {
            "what": f"{self.what}, split {self.split}",
            "records": FORMAT,
            "sources": prints,
            "tokenizer": self.tokenizer.sha256,
            "template": TEMPLATE_HASH,
            "max_rows": self.max_rows,
            "exclude": sha256_json(sorted(self.exclude)),
            **options,
        }
        store = build_from_batches(
            self.data.cache_dir,
            segments=self.segments,
            key=key,
            batches=lambda after: self._batches(encode, prints, after),
            n_vocab=self.tokenizer.n_vocab,
            pad_id=self.tokenizer.pad_id,
            counts=self.total,
            sources=self.summaries,
        )
        for source in store.sources:  # it may have been built under a higher limit
            counts = RowCounts(source["rows"], source["dropped"], self.data.max_bad_rows)
            counts.check(f"{source['source']}, {self.split} split: ")
        return store

    def _batches(
        self, encode: Encode, prints: list[str], after: dict[str, Any] | None
    ) -> Iterator[Encoded]:
        """Encoded records behind ``after``, which says how far an earlier reading came."""
        begun = after or {"summaries": [], "rows": 0, "kept": 0, "tokens": 0, "dropped": {}}
        self.summaries.extend(begun["summaries"])
        at = len(self.summaries)
        for source, fingerprint in zip(self.sources[at:], prints[at:], strict=True):
            yield from self._of_source(source, fingerprint, encode, begun)
            begun = {"rows": 0, "kept": 0, "tokens": 0, "dropped": {}}
        for summary in self.summaries:
            for reason, n in summary["dropped"].items():
                self.total.dropped[reason] = self.total.dropped.get(reason, 0) + n

    def _of_source(
        self, source: Source, fingerprint: str, encode: Encode, begun: dict[str, Any]
    ) -> Iterator[Encoded]:
        """Encoded records of one source; at its end its summary is there."""
        counts = RowCounts(max_bad_rows=self.data.max_bad_rows)
        rows, kept, tokens = begun["rows"], begun["kept"], begun["tokens"]
        dropped = dict(begun["dropped"])  # by the encoder; what the reading drops is counted anew
        given = itertools.islice(self._kept(source, counts), rows, self.max_rows)
        done = list(self.summaries)
        for batch in encode_rows(
            given, encode, token_dtype(self.tokenizer.n_vocab), len(self.segments),
            jobs=current().jobs,
        ):  # fmt: skip
            rows += batch.rows
            kept += len(batch.records.lengths)
            tokens += len(batch.records.tokens)
            for reason, n in batch.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + n
            state = {"rows": rows, "kept": kept, "tokens": tokens, "dropped": dict(dropped)}
            yield replace(batch.records, after={"summaries": done, **state})
        for reason, n in dropped.items():
            counts.dropped[reason] = counts.dropped.get(reason, 0) + n
        self.summaries.append(
            {
                "source": source.description,
                "split": self.split,
                "kind": source.kind,
                "rows": kept,
                "tokens": tokens,
                "dropped": counts.dropped,
                "fingerprint": fingerprint,
            }
        )

    def _kept(self, source: Source, counts: RowCounts) -> Iterator[Row]:
        for row in source.rows(self.split, counts):
            if self.exclude and prompt_hash(prompt_of(row)) in self.exclude:
                counts.drop("prompt is in another split")
            else:
                yield row

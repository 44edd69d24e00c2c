"""The text of pretraining: its sources, the tokenizer made for it, and its token stores."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from modern_llm.config import PipelineConfig, StageConfig
from modern_llm.config.data import DataConfig
from modern_llm.data.prepare import text_store
from modern_llm.data.sources import open_source
from modern_llm.data.sources.base import RowCounts, Source
from modern_llm.data.store import TokenStore
from modern_llm.data.tokenizer import Tokenizer, build_tokenizer
from modern_llm.runtime.artifacts import sha256_json


def stage_sources(section: StageConfig, data: DataConfig, split: str) -> list[Source]:
    """A stage's sources; ``validation`` has its own list where the config gives one."""
    chosen = section.data
    if split == "validation" and section.validation is not None:
        chosen = section.validation
    return [open_source(source, data) for source in chosen]


def in_turns(
    sources: Sequence[Source], split: str, counts: RowCounts | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a split, the sources in turn: each has its part where not all are read."""
    turns = itertools.zip_longest(*(source.rows(split, counts) for source in sources))
    return (row for turn in turns for row in turn if row is not None)


def new_tokenizer(config: PipelineConfig) -> Tokenizer:
    """The tokenizer that the config asks for, fitted to the training text where it is fitted.

    One that was fitted is found by what decides the text, which need not be read for it.
    """
    sources = stage_sources(config.pretrain, config.data, "train")
    return build_tokenizer(
        config.tokenizer, vocab_size=config.model.vocab_size,
        texts=lambda: (row["text"] for row in in_turns(sources, "train")), data=config.data,
        fingerprint=sha256_json([source.fingerprint("train") for source in sources]),
    )  # fmt: skip


def training_stores(config: PipelineConfig, tokenizer: Tokenizer) -> list[TokenStore]:
    """Training text, one store a source."""
    sources = stage_sources(config.pretrain, config.data, "train")
    return [text_store([source], "train", tokenizer, config.data) for source in sources]


def validation_store(config: PipelineConfig, tokenizer: Tokenizer) -> TokenStore:
    """Held-out text."""
    return text_store(
        stage_sources(config.pretrain, config.data, "validation"), "validation", tokenizer,
        config.data, max_rows=config.pretrain.max_validation_rows,
    )  # fmt: skip

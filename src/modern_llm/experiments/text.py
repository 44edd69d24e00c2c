"""The text of an experiment: tokenized once before any cell starts, and what identifies it."""

import hashlib
from dataclasses import dataclass

from modern_llm.config import PipelineConfig
from modern_llm.data.pretraining import (
    in_turns,
    new_tokenizer,
    stage_sources,
    training_stores,
    validation_store,
)


@dataclass(frozen=True)
class Text:
    """Sizes and hashes of the text that an experiment is trained and scored on.

    Attributes:
        train_tokens: of one pass.
        train_sha256: of the training text, before it is tokenized.
        validation_bytes: UTF-8 bytes of the validation text.
        validation_sha256: of the validation text.
        tokenizer_sha256: of ``tokenizer.json``.
    """

    train_tokens: int
    train_sha256: str
    validation_bytes: int
    validation_sha256: str
    tokenizer_sha256: str


def prepare_text(config: PipelineConfig) -> Text:
    """Build tokenizer and token stores where they do not stand, and tell what they hold.

    Raises:
        DataError: a source cannot be had.
    """
    tokenizer = new_tokenizer(config)
    stores = training_stores(config, tokenizer)
    validation_store(config, tokenizer)
    prints = [row["fingerprint"] for store in stores for row in store.sources]
    hashed, n_bytes = hashlib.sha256(), 0
    sources = stage_sources(config.pretrain, config.data, "validation")
    limit = config.pretrain.max_validation_rows
    for source in sources:
        for at, row in enumerate(in_turns([source], "validation")):
            if limit is not None and at >= limit:
                break
            data = row["text"].encode()
            hashed.update(len(data).to_bytes(8, "big") + data)
            n_bytes += len(data)
    return Text(
        train_tokens=sum(row["tokens"] for store in stores for row in store.sources),
        train_sha256=hashlib.sha256("".join(prints).encode()).hexdigest(),
        validation_bytes=n_bytes,
        validation_sha256=hashed.hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
    )

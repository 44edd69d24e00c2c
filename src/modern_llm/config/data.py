"""Where data is found and how it is turned into tokens."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from modern_llm.config.schema import Schema

DEFAULT_TRAIN_MB = 100


class TokenizerConfig(Schema):
    """The tokenizer; it may have at most ``model.vocab_size`` ids.

    ``bpe`` is byte-level and trained on the pretraining split up to ``model.vocab_size``; ``char``
    takes the characters of that split; ``gpt2`` is read from the data root or the hub; ``file``
    is any ``tokenizer.json``.
    """

    name: Literal["bpe", "char", "gpt2", "file"] = "bpe"
    path: Path | None = None
    max_train_mb: int = Field(DEFAULT_TRAIN_MB, gt=0)  # text that a trained tokenizer is fitted to

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        problems = []
        if (self.name == "file") != (self.path is not None):
            problems.append("path belongs to the tokenizer 'file', which needs it")
        if self.name in ("gpt2", "file") and self.max_train_mb != DEFAULT_TRAIN_MB:
            problems.append(
                f"max_train_mb={self.max_train_mb} has no effect with the tokenizer "
                f"'{self.name}', which is not trained here; leave it at {DEFAULT_TRAIN_MB}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class DataConfig(Schema):
    """Where sources are looked up and what is done with bad rows."""

    root: Path | None = None  # default: the directory named by MODERN_LLM_DATA
    cache_dir: Path = Path("experiments/cache")  # tokenizers and token shards
    max_bad_rows: NonNegativeInt = 100  # malformed rows that a source may have
    replay: float = Field(0.0, ge=0, lt=1)  # share of SFT rows drawn from the pretraining text

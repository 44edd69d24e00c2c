"""What the parent tells every contestant: sizes, where the tokens are, how many threads."""

import argparse
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of one optimizer step, all counts.

    ``config`` is the project's config file and ``tokens`` a ``.npy`` of token ids; ``variant`` is
    the contestant's own (a precision, or overrides of the config).
    """

    config: str
    tokens: str
    variant: str
    threads: int
    steps: int
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    seq_len: int
    batch_size: int

    @classmethod
    def from_args(cls) -> "Sizes":
        parser = argparse.ArgumentParser()
        for name, kind in cls.__annotations__.items():
            parser.add_argument(f"--{name}", type=kind, required=True)
        return cls(**vars(parser.parse_args()))

    def to_args(self) -> list[str]:
        return [f"--{name}={value}" for name, value in vars(self).items()]

    def window(self, index: int) -> np.ndarray:
        """Tokens ``(seq_len + 1,)`` int64 at a place that depends on ``index`` only."""
        tokens = np.load(self.tokens, mmap_mode="r")
        start = index * 7919 * self.seq_len % (len(tokens) - self.seq_len - 1)
        return tokens[start : start + self.seq_len + 1].astype(np.int64)

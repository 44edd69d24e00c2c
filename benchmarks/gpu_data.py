"""What ``gpu.py`` measures on: how large things are, and stages that learn random ids.

Text and pairs are random ids, as frequent as words are; all else is what a run of the preset has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from modern_llm.alignment.stages.dpo import DPOStage
from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.data.store import TokenStore, build_store

STORE_TOKENS = 2_000_000
MAX_ROWS = 64  # of a micro-batch; 65,536 tokens fill any card
N_PAIRS = 384


@dataclass(frozen=True)
class Sizes:
    """How large everything is; lengths in tokens."""

    overrides: tuple[str, ...] = ()  # of the presets
    agreement: tuple[int, int, int, int] = (4096, 256, 4, 256)  # vocabulary, width, layers, length
    chunk: int = 8192  # tokens of a chunk of the loss
    seconds: float = 10.0  # of a measured loop, at least
    max_rows: int = MAX_ROWS
    n_pairs: int = N_PAIRS
    new_tokens: int = 128


SIZES = {
    "full": Sizes(),
    "tiny": Sizes(
        overrides=(
            "model.vocab_size=384", "model.d_model=32", "model.n_layers=2", "model.n_heads=4",
            "model.n_kv_heads=2", "model.d_ff=64", "model.max_seq_len=64",
            "pretrain.training.batch_size=8", "pretrain.training.micro_batch_size=4",
            "dpo.training.batch_size=8", "dpo.training.micro_batch_size=4",
            "dpo.max_prompt_tokens=32", "dpo.max_answer_tokens=16",
        ),
        agreement=(384, 32, 2, 32), chunk=64, seconds=0.2, max_rows=8, n_pairs=32, new_tokens=8,
    ),
}  # fmt: skip


def words(rng: np.random.Generator, n: int, n_vocab: int) -> np.ndarray:
    """Ids whose frequency falls as one over their rank, as that of words does."""
    return (n_vocab ** rng.random(n)).astype(np.int64) - 1


class RandomText(PretrainStage):
    """Pretraining on random ids."""

    @cached_property
    def stores(self) -> list[TokenStore]:
        """One store, of one record."""
        n_vocab = self.config.model.vocab_size
        ids = words(np.random.default_rng(0), STORE_TOKENS, n_vocab)
        return [
            build_store(
                self.config.data.cache_dir, segments=("text",), key={"text": STORE_TOKENS},
                records=iter([(ids,)]), n_vocab=n_vocab, pad_id=self.tokenizer.pad_id,
            )
        ]  # fmt: skip


class RandomPairs(DPOStage):
    """Preference pairs of random ids: prompts and answers from a quarter of the longest on."""

    n_pairs = N_PAIRS

    @cached_property
    def store(self) -> TokenStore:
        """Training pairs."""
        rng, n_vocab = np.random.default_rng(0), self.config.model.vocab_size
        prompt, answer = self.section.max_prompt_tokens, self.section.max_answer_tokens
        longest = np.array([prompt, answer, answer])

        def records() -> Iterator[tuple[np.ndarray, ...]]:
            for _ in range(self.n_pairs):
                lengths = rng.integers(longest // 4, longest, endpoint=True)
                yield tuple(words(rng, n, n_vocab) for n in lengths)

        return build_store(
            self.config.data.cache_dir, segments=("prompt", "chosen", "rejected"),
            key={"pairs": self.n_pairs, "longest": longest.tolist()}, records=records(),
            n_vocab=n_vocab, pad_id=self.tokenizer.pad_id,
        )  # fmt: skip

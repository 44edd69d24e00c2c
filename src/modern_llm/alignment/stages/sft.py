"""Supervised fine-tuning: prompts and answers, loss on the answer and its EOS only."""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from modern_llm.alignment.audit import AUDITED_BATCHES, mask_audit
from modern_llm.alignment.stages.base import STAGES, TrainedStage
from modern_llm.config import SFTConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.data.loader import PackedLoader
from modern_llm.data.prepare import instruct_store, prompt_hashes, text_store
from modern_llm.data.sources import open_source
from modern_llm.data.store import TokenStore
from modern_llm.runtime.artifacts import write_text
from modern_llm.runtime.ranks import group
from modern_llm.training.objectives import LMObjective, Objective


@STAGES.register("sft")
class SFTStage(TrainedStage):
    """Teach a pretrained model to answer. Needs ``pretrain``; writes ``<run>/sft/``."""

    name = "sft"
    starts_from = "pretrain"

    @property
    def section(self) -> SFTConfig:
        """The stage's part of the config."""
        return self.config.sft

    def _store(self, split: str, exclude: frozenset[str] = frozenset()) -> TokenStore:
        return instruct_store(
            self.sources(split), split, self.tokenizer, self.config.data,
            max_tokens=self.section.training.seq_len,
            max_rows=self.section.max_validation_rows if split == "validation" else None,
            exclude=exclude,
        )  # fmt: skip

    @cached_property
    def validation_store(self) -> TokenStore:
        """Held-out rows."""
        return self._store("validation")

    @cached_property
    def store(self) -> TokenStore:
        """Training rows whose prompts are not held out."""
        rows = self.section.max_validation_rows
        return self._store("train", prompt_hashes(self.sources("validation"), "validation", rows))

    @cached_property
    def replay(self) -> TokenStore | None:
        """Pretraining text that is mixed in, when ``data.replay`` asks for it."""
        if not self.config.data.replay:
            return None
        sources = [open_source(source, self.config.data) for source in self.config.pretrain.data]
        return text_store(sources, "train", self.tokenizer, self.config.data)

    def _loader(self, store: TokenStore, replay: TokenStore | None) -> PackedLoader:
        training = self.section.training
        return PackedLoader(
            store,
            seq_len=training.seq_len, batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size, seed=training.seed,
            replay=replay, replay_share=self.config.data.replay if replay else 0.0,
            ranks=group().ranks,
        )  # fmt: skip

    def loader(self) -> PackedLoader:
        """Examples packed into rows, kept apart by document ids."""
        return self._loader(self.store, self.replay)

    def validation(self) -> Sequence[TokenBatch]:
        """Every held-out example once."""
        return self._loader(self.validation_store, None).one_pass()

    def data_records(self) -> list[dict[str, Any]]:
        """Summaries of all stores."""
        stores = (self.store, self.validation_store, *filter(None, (self.replay,)))
        return [row for store in stores for row in store.sources]

    def objective(self) -> Objective:
        """Cross entropy of answer tokens; only their logits are computed."""
        return LMObjective(gather=True)

    def audit(self) -> dict[str, Any]:
        """Write ``mask_audit.txt``; a broken mask stops the stage here."""
        batches = itertools.chain.from_iterable(map(self.loader().batches, itertools.count()))
        facts, text = mask_audit(list(itertools.islice(batches, AUDITED_BATCHES)), self.tokenizer)
        write_text(self.folder / "mask_audit.txt", text, on_exists="skip")
        return facts

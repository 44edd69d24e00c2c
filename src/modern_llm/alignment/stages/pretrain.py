"""Pretraining: next-token prediction on packed text."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import nn

from modern_llm.alignment.stages.base import STAGES, TrainedStage
from modern_llm.config import PretrainConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.data.loader import TextLoader
from modern_llm.data.pretraining import new_tokenizer, training_stores, validation_store
from modern_llm.data.store import TokenStore
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.evaluation.speed import MIN_CONTEXT, measure_speed
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.ranks import group
from modern_llm.runtime.seeding import derive_seed, seed_everything
from modern_llm.training.checkpoint import TOKENIZER
from modern_llm.training.handover import read_tokenizer
from modern_llm.training.objectives import LMObjective, Objective
from modern_llm.training.records import FirstLoss
from modern_llm.training.retention import newest_good

FIRST_LOSS_TOLERANCE = 0.5  # nats around ln V


@STAGES.register("pretrain")
class PretrainStage(TrainedStage):
    """Train a decoder from nothing, or go on from a checkpoint. Writes ``<run>/pretrain/``."""

    name = "pretrain"

    @property
    def section(self) -> PretrainConfig:
        """The stage's part of the config."""
        return self.config.pretrain

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, else one made for the training text.

        A run that goes on with changed data keeps the tokenizer that its weights know.
        """
        if self.parent is not None:
            return read_tokenizer(self.parent)
        if self.allow_data_change and (last := newest_good(self.folder / "checkpoints")):
            return Tokenizer.load(last / TOKENIZER)
        return new_tokenizer(self.config)

    @cached_property
    def stores(self) -> list[TokenStore]:
        """Training text, one store a source."""
        return training_stores(self.config, self.tokenizer)

    @cached_property
    def validation_store(self) -> TokenStore:
        """Held-out text."""
        return validation_store(self.config, self.tokenizer)

    def _loader(self, stores: list[TokenStore], weights: list[float | None]) -> TextLoader:
        training = self.section.training
        return TextLoader(
            stores, weights,
            seq_len=training.seq_len, batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size, seed=training.seed,
            doc_mask=training.doc_mask, ranks=group().ranks,
        )  # fmt: skip

    def loader(self) -> TextLoader:
        """Blocks of text in seeded order, mixed by weight."""
        return self._loader(self.stores, [source.weight for source in self.section.data])

    def validation(self) -> Sequence[TokenBatch]:
        """Every held-out token once."""
        return self._loader([self.validation_store], [None]).one_pass()

    def data_records(self) -> list[dict[str, Any]]:
        """Summaries of all stores."""
        return [row for store in (*self.stores, self.validation_store) for row in store.sources]

    def objective(self) -> Objective:
        """Cross entropy of every token."""
        return LMObjective(compile=self.section.training.compile)

    def build_model(self) -> nn.Module:
        """A fresh decoder, or the checkpoint's."""
        if self.parent is not None:
            return super().build_model()
        seed_everything(derive_seed(self.section.training.seed, "weights"))
        return ModernDecoderLM(self.config.model)

    def fill(self, model: nn.Module) -> None:
        """The weights that a fresh decoder draws, or the checkpoint's."""
        if self.parent is not None:
            return super().fill(model)
        assert isinstance(model, ModernDecoderLM)
        return model.initialize_again()

    def first_loss(self) -> FirstLoss | None:
        """About ln V at a fresh start."""
        if self.parent is not None:
            return None
        vocab_size = self.config.model.vocab_size
        return FirstLoss(
            math.log(vocab_size), FIRST_LOSS_TOLERANCE, f"ln V of a vocabulary of {vocab_size}"
        )

    def inference(self, model: ModernDecoderLM) -> dict[str, Any] | None:
        """Speed of the model as it was trained, in the precision of training, not compiled."""
        training = self.section.training
        if self.config.model.max_seq_len < MIN_CONTEXT:
            return None
        with torch.compiler.set_stance("force_eager") if training.compile else nullcontext():
            return asdict(measure_speed(model, precision=training.precision))

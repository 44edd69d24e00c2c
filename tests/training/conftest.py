"""A tiny model, a loader that draws its batches from the step, and a Trainer over both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.models import ModernDecoderLM
from modern_llm.training import LMObjective, Trainer

VOCAB, SEQ_LEN, ROWS = 32, 8, 4


class StepLoader:
    """Random rows of optimizer step ``step``, with a ragged mask, as ``n_micro`` micro-batches."""

    steps_per_epoch = 4

    def __init__(self, n_micro: int = 2, fingerprint: str = "data-1") -> None:
        self.n_micro, self.fingerprint = n_micro, fingerprint
        self.asked: list[int] = []

    def batches(self, step: int) -> list[TokenBatch]:
        self.asked.append(step)
        rng = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, VOCAB, (ROWS, SEQ_LEN + 1), generator=rng)
        inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=rng) < 0.3] = -100
        pairs = zip(inputs.chunk(self.n_micro), labels.chunk(self.n_micro), strict=True)
        return [TokenBatch(x, y) for x, y in pairs]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model() -> Callable[..., ModernDecoderLM]:
    def make(**changes: Any) -> ModernDecoderLM:
        torch.manual_seed(7)
        sizes = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 8}
        return ModernDecoderLM(ModelConfig(**{**sizes, "dropout": 0.1, **changes}))

    return make


@pytest.fixture
def make_config() -> Callable[..., TrainingConfig]:
    def make(**changes: Any) -> TrainingConfig:
        base = {"max_steps": 12, "batch_size": ROWS, "micro_batch_size": 2, "seq_len": SEQ_LEN}
        rest = {"lr": 3e-3, "device": "cpu", "log_every": 1, "save_every": 4}
        return TrainingConfig(**{**base, **rest, **changes})

    return make


@pytest.fixture
def make_loader() -> Callable[..., StepLoader]:
    return StepLoader


@pytest.fixture
def make_trainer(
    make_model: Callable[..., ModernDecoderLM], make_config: Callable[..., TrainingConfig]
) -> Callable[..., Trainer]:
    def make(folder: Path, *, model: Any = None, loader: Any = None, **options: Any) -> Trainer:
        wanted = set(TrainingConfig.model_fields)
        config = {key: options.pop(key) for key in list(options) if key in wanted}
        own = model or make_model()
        meta = {"stage": "pretrain"}
        if isinstance(own, ModernDecoderLM):
            meta["model"] = own.config.model_dump(mode="json")
        return Trainer(
            own,
            options.pop("objective", LMObjective()),
            loader or StepLoader(),
            make_config(**config),
            folder=folder,
            tokenizer_json="{}",
            checkpoint_meta=meta,
            **options,
        )

    return make

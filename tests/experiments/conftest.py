"""Studies of models so small that a training takes a fraction of a second."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from modern_llm.cli import main
from modern_llm.config import StudyConfig
from modern_llm.experiments.cells import Cell

TEXT = {"name": "synthetic", "kind": "text", "rows": 200, "held_out_rows": 8}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Changes of the preset ``gpt2`` to a model of 9,000 parameters on 200 synthetic texts."""
    return {
        **{"model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "model.max_seq_len": 32},
        **{"model.vocab_size": 300, "tokenizer.name": "bpe", "pretrain.data": [TEXT]},
        **{"pretrain.training.max_steps": 6, "pretrain.training.batch_size": 4},
        **{"pretrain.training.micro_batch_size": 4, "pretrain.training.warmup": 0},
        **{"pretrain.training.eval_every": 3, "pretrain.training.log_every": 2},
        **{"training.device": "cpu", "training.precision": "fp32"},
        **{"data.cache_dir": str(tmp_path_factory.mktemp("cache"))},
    }


@pytest.fixture
def make_study(small: dict[str, Any]) -> Callable[..., StudyConfig]:
    """Config of a small study: ``make_study({"a": {}, "b": {...}}, seeds=[0, 1])``."""

    def make(arms: dict[str, Any], **fields: Any) -> StudyConfig:
        overrides = small | fields.pop("overrides", {})
        given = {"name": "small", "base": "gpt2", "arms": arms, **fields}
        return StudyConfig.model_validate({**given, "overrides": overrides})

    return make


@pytest.fixture(scope="session")
def train_here() -> Callable[[Sequence[Cell]], None]:
    """Train cells in this process, by the very command that a sweep starts them with."""

    def train(cells: Sequence[Cell]) -> None:
        for cell in cells:
            words = cell.command()
            assert words[1:3] == ["-m", "modern_llm"]
            assert main(words[3:]) == 0

    return train


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that is started fails the test."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr("modern_llm.experiments.cells._start", refuse)

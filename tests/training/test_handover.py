from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import DataConfig, TokenizerConfig
from modern_llm.data.templates import TEMPLATE_HASH
from modern_llm.data.tokenizer import Tokenizer, build_tokenizer
from modern_llm.errors import CheckpointError
from modern_llm.models import ModernDecoderLM
from modern_llm.models.weights import model_weights
from modern_llm.training.checkpoint import Checkpoint, read_checkpoint
from modern_llm.training.checkpoint import write_checkpoint as write
from modern_llm.training.handover import model_config, read_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return build_tokenizer(
        TokenizerConfig(name="char"),
        vocab_size=280,
        texts=lambda: iter(["abc"]),
        data=DataConfig(cache_dir=tmp_path / "cache"),
    )


@pytest.fixture
def save(
    tmp_path: Path, tokenizer: Tokenizer, make_model: Callable[..., ModernDecoderLM]
) -> Callable[..., Checkpoint]:
    """A checkpoint whose description says this."""

    def call(*, text: str | None = None, vocab_size: int = 280, **meta: Any) -> Checkpoint:
        model = make_model(vocab_size=vocab_size)
        own = {"model": model.config.model_dump(mode="json"), **meta}
        target = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        write(
            target,
            weights=model_weights(model),
            meta=own,
            tokenizer_json=tokenizer.to_json() if text is None else text,
            trainer_state=None,
        )
        return read_checkpoint(target)

    return call


def test_what_was_trained_comes_back(
    save: Callable[..., Checkpoint], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    hashes = {"tokenizer_sha256": tokenizer.sha256, "template_sha256": TEMPLATE_HASH}
    for meta in ({}, hashes):
        found = save(**meta)
        assert read_tokenizer(found).to_json() == tokenizer.to_json()
        assert model_config(found).vocab_size == 280
    assert not caplog.records


def test_a_tokenizer_of_another_training_is_refused(
    save: Callable[..., Checkpoint], tokenizer: Tokenizer
) -> None:
    with pytest.raises(CheckpointError, match="is not the one that it was trained with"):
        read_tokenizer(save(tokenizer_sha256="0" * 64))
    limit = tokenizer.n_vocab
    assert read_tokenizer(save(vocab_size=limit)).n_vocab == limit
    with pytest.raises(CheckpointError, match=f"has {limit} ids, its model {limit - 1}"):
        read_tokenizer(save(vocab_size=limit - 1))


@pytest.mark.parametrize("text", ["", "{}", "no json"])
def test_a_tokenizer_that_is_none_is_refused(save: Callable[..., Checkpoint], text: str) -> None:
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        read_tokenizer(save(text=text))


def test_another_template_is_told(
    save: Callable[..., Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    read_tokenizer(save(template_sha256="0" * 64))
    assert "another chat template" in caplog.text


@pytest.mark.parametrize("model", [None, {}, {"d_model": 8}, {"colour": "red"}, 3])
def test_a_description_without_a_model_is_refused(
    save: Callable[..., Checkpoint], model: Any
) -> None:
    with pytest.raises(CheckpointError, match="no valid model"):
        model_config(save(model=model))

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.audit import mask_audit
from modern_llm.alignment.stages.sft import SFTStage
from modern_llm.config import DataConfig, PipelineConfig
from modern_llm.data.collate import IGNORE, TokenBatch
from modern_llm.data.loader import PackedLoader
from modern_llm.data.prepare import instruct_store
from modern_llm.data.sources.base import Source
from modern_llm.data.templates import Turn
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import DataError

Break = Callable[[torch.Tensor, TokenBatch, Tokenizer], None]  # changes labels in place


@pytest.fixture
def batches(tiny: PipelineConfig, tiny_run: Any, tmp_path: Path) -> list[TokenBatch]:
    stage = SFTStage(tiny, tmp_path, tiny_run.run / "pretrain" / "final")
    loader = stage.loader()
    found = [batch for step in range(3) for batch in loader.batches(step)]
    assert any(int(batch.doc_ids_BT.max()) > 0 for batch in found)  # type: ignore[union-attr]
    assert any(bool((batch.doc_ids_BT < 0).any()) for batch in found)  # type: ignore[operator]
    return found


def broken(batches: Sequence[TokenBatch], how: Break, tokenizer: Tokenizer) -> list[TokenBatch]:
    done = []
    for batch in batches:
        labels = batch.labels_BT.clone()
        how(labels, batch, tokenizer)
        done.append(replace(batch, labels_BT=labels))
    return done


def next_tokens(batch: TokenBatch) -> torch.Tensor:
    return torch.roll(batch.tokens_BT, -1, dims=1)


def nothing(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    labels.fill_(IGNORE)


def everything(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    labels.copy_(next_tokens(batch))
    assert batch.doc_ids_BT is not None
    labels[batch.doc_ids_BT < 0] = IGNORE


def no_eos(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    labels[labels == tokenizer.eos_id] = IGNORE


def one_row_without_target(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    labels[-1] = IGNORE


def prompt_marker(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    here = next_tokens(batch) == tokenizer.assistant_id
    labels[here] = tokenizer.assistant_id


def one_early(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    learned = labels != IGNORE
    labels.fill_(IGNORE)
    at = torch.roll(learned, -1, dims=1)
    labels[at] = next_tokens(batch)[at]


def one_late(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    learned = labels != IGNORE
    first = learned & ~torch.roll(learned, 1, dims=1)
    labels[first] = IGNORE


def not_shifted(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    """Each token is its own label: the loss falls at once and nothing is learned."""
    learned = torch.roll(labels != IGNORE, 1, dims=1)
    labels.fill_(IGNORE)
    labels[learned] = batch.tokens_BT[learned]


def shifted_twice(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    learned = labels != IGNORE
    labels[learned] = torch.roll(batch.tokens_BT, -2, dims=1)[learned]


def padding(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    assert batch.doc_ids_BT is not None
    labels[batch.doc_ids_BT < 0] = tokenizer.pad_id


def a_hole(labels: torch.Tensor, batch: TokenBatch, tokenizer: Tokenizer) -> None:
    row, at = (labels != IGNORE).nonzero()[1].tolist()
    labels[row, at] = IGNORE


FAULTS: dict[str, tuple[Break, str]] = {
    "nothing": (nothing, "an example has no supervised token; the supervised share is 0%"),
    "everything": (everything, "a prompt token is supervised"),
    "no eos": (no_eos, "the EOS of an answer is not supervised"),
    "a row without target": (one_row_without_target, "an example has no supervised token"),
    "a prompt marker": (prompt_marker, "a prompt token is supervised"),
    "one early": (one_early, "a prompt token is supervised"),
    "one late": (one_late, "the first token of an answer is not supervised"),
    "not shifted": (not_shifted, "a label is not the token that follows"),
    "shifted twice": (shifted_twice, "a label is not the token that follows"),
    "padding": (padding, "padding is supervised"),
    "a hole": (a_hole, "an answer is supervised in part"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_broken_mask_is_refused(
    batches: list[TokenBatch], tokenizer: Tokenizer, fault: str
) -> None:
    how, told = FAULTS[fault]
    with pytest.raises(DataError) as error:
        mask_audit(broken(batches, how, tokenizer), tokenizer)
    assert told in str(error.value)
    assert str(error.value).endswith("nothing was trained")


def test_the_right_mask_passes_with_its_counts(
    batches: list[TokenBatch], tokenizer: Tokenizer
) -> None:
    facts, text = mask_audit(batches, tokenizer)
    seen = batches[:8]
    supervised = sum(int((batch.labels_BT != IGNORE).sum()) for batch in seen)
    assert facts["supervised"] == supervised
    assert facts["tokens"] == sum(batch.n_tokens for batch in seen)
    assert facts["documents"] == sum(
        int((batch.tokens_BT == tokenizer.assistant_id).sum()) for batch in seen
    )
    assert 0 < facts["share"] < 1
    assert f"supervised tokens: {supervised} of {facts['tokens']}" in text
    assert text.count("row ") == 3


def test_the_audit_marks_the_answer_from_its_first_token_to_eos(
    tokenizer: Tokenizer, make_source: Callable[..., Source], data: DataConfig
) -> None:
    source = make_source([{"prompt": "Say it.", "answer": "Yes, now."}])
    store = instruct_store([source], "train", tokenizer, data, max_tokens=32)
    loader = PackedLoader(store, seq_len=32, batch_size=1, micro_batch_size=1, seed=0)
    _, text = mask_audit(list(loader.batches(0)), tokenizer)
    row = next(line for line in text.splitlines() if line.startswith("<|bos|>"))
    words = [tokenizer.token(i) for i in tokenizer.encode("Yes, now.")]
    assert row.endswith("<|assistant|> " + " ".join(f"[{w}]" for w in [*words, "<|eos|>"]))
    assert row.count("[") == len(words) + 1


def test_a_dialogue_is_learned_in_its_last_answer_only(
    tokenizer: Tokenizer, make_source: Callable[..., Source], data: DataConfig
) -> None:
    turns = [Turn("user", "Hello."), Turn("assistant", "Hi."), Turn("user", "And?")]
    source = make_source([{"prompt": turns, "answer": "Well."}])
    store = instruct_store([source], "train", tokenizer, data, max_tokens=64)
    loader = PackedLoader(store, seq_len=64, batch_size=1, micro_batch_size=1, seed=0)
    facts, _ = mask_audit(list(loader.batches(0)), tokenizer)
    assert facts["supervised"] == len(tokenizer.encode("Well.")) + 1


def test_the_stage_stops_before_training_on_a_broken_mask(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tokenizer: Tokenizer,
) -> None:  # fmt: skip
    read = PackedLoader.batches

    def without_eos(self: PackedLoader, step: int) -> Any:
        return broken(list(read(self, step)), no_eos, tokenizer)

    monkeypatch.setattr(PackedLoader, "batches", without_eos)
    stage = SFTStage(tiny, tmp_path, tiny_run.run / "pretrain" / "final")
    with pytest.raises(DataError, match="EOS of an answer is not supervised"):
        stage.execute()
    assert not (stage.folder / "checkpoints").exists()
    assert not (stage.folder / "result.json").exists()


def test_the_audit_of_the_run_is_a_file(tiny_run: Any) -> None:
    text = (tiny_run.run / "sft" / "mask_audit.txt").read_text()
    assert text.startswith("supervised tokens: ")
    assert "[<|eos|>]" in text and "[<|assistant|>]" not in text and "[<|user|>]" not in text

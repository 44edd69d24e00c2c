import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.stages.sft import SFTStage
from modern_llm.config import PipelineConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.data.loader import PackedLoader
from modern_llm.data.packing import PackedRows
from modern_llm.data.store import TokenStore
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.models import ModernDecoderLM
from modern_llm.training.objectives import LMObjective

Models = Callable[..., ModernDecoderLM]
KINDS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned positions": {"position": "learned"},
    "window and sinks": {"attention": "window", "window": 4, "n_sinks": 1},
    "manual backend, learned sink": {"attention_backend": "manual", "sink": "learned"},
}


def examples(n: int) -> list[tuple[list[int], list[int]]]:
    """Prompts of 3 to 6 tokens and answers of 1 to 7, ids from 5 on."""
    rng = torch.Generator().manual_seed(8)

    def ids(least: int, most: int) -> list[int]:
        size = int(torch.randint(least, most + 1, (), generator=rng))
        return torch.randint(5, 24, (size,), generator=rng).tolist()

    return [(ids(3, 6), ids(1, 7)) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_packed_with_others_costs_what_it_costs_alone(
    make_model: Models, make_store: Callable[..., TokenStore], kind: str
) -> None:
    records = examples(12)
    store = make_store(records, ("prompt", "answer"))
    loader = PackedLoader(store, seq_len=32, batch_size=2, micro_batch_size=2, seed=1)
    model = make_model(**KINDS[kind])
    objective = LMObjective(gather=True)
    packed = list(loader.one_pass())
    assert sum(len(batch.tokens_BT) for batch in packed) < len(records)
    with torch.no_grad():
        together = sum(objective(model, batch).loss_sum.item() for batch in packed)
        alone = 0.0
        for prompt, answer in records:
            logprob_TV = model(torch.tensor([prompt + answer]))[0].double().log_softmax(-1)
            first = len(prompt) - 1
            alone -= sum(logprob_TV[first + i, t].item() for i, t in enumerate(answer))
    assert sum(objective.units(batch) for batch in packed) == sum(len(a) for _, a in records)
    assert together == pytest.approx(alone, rel=1e-5)


def test_neighbours_in_a_row_do_not_reach_an_example(
    make_model: Models, make_store: Callable[..., TokenStore]
) -> None:
    def logits(first_token: int) -> torch.Tensor:
        records = [([first_token] * 6, [6, 7]), ([5, 8, 9], [10, 11, 12])]
        rows = PackedRows(make_store(records, ("prompt", "answer")), 32, seed=0)
        assert len(rows) == 1  # both in one row
        tokens, labels, docs, pos = (torch.from_numpy(a.copy()) for a in rows.read(rows_of(1)))
        batch = TokenBatch(tokens, labels, docs, pos)
        own = (batch.tokens_BT[0] == 10).nonzero().item()
        with torch.no_grad():
            out = make_model()(batch.tokens_BT, doc_ids_BT=batch.doc_ids_BT, pos_BT=batch.pos_BT)
        return out[0, own - 1]

    torch.testing.assert_close(logits(20), logits(21), rtol=0, atol=1e-6)


def rows_of(n: int) -> Any:
    return torch.arange(n).numpy()


def stage(config: PipelineConfig, tiny_run: Any, folder: Path) -> SFTStage:
    return SFTStage(config, folder, tiny_run.run / "pretrain" / "final")


def with_(config: PipelineConfig, **sections: dict[str, Any]) -> PipelineConfig:
    raw = config.model_dump(mode="json")
    for name, values in sections.items():
        raw[name] = {**raw[name], **values}
    return PipelineConfig.model_validate(raw)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_replayed_text_has_its_share_of_the_rows(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, tokenizer: Tokenizer, share: float
) -> None:
    made = stage(with_(tiny, data={"replay": share}), tiny_run, tmp_path)
    loader, replayed, rows = made.loader(), 0, 0
    for step in range(250):  # 1000 rows
        for batch in loader.batches(step):
            texts = ~(batch.tokens_BT == tokenizer.assistant_id).any(dim=1)
            replayed, rows = replayed + int(texts.sum()), rows + len(texts)
            docs, labels = batch.doc_ids_BT[texts], batch.labels_BT[texts]  # type: ignore[index]
            inside = (docs[:, 1:] == docs[:, :-1]) & (docs[:, 1:] >= 0)  # text is learned whole
            assert torch.equal(labels[:, :-1][inside], batch.tokens_BT[texts][:, 1:][inside])
    assert replayed / rows == pytest.approx(share, abs=1e-9)
    held_out = [batch for batch in made.validation()]
    assert all((b.tokens_BT == tokenizer.assistant_id).any(dim=1).all() for b in held_out)
    kinds = [row["kind"] for row in made.data_records()]
    assert kinds.count("text") == (1 if share else 0)


def test_the_mask_audit_passes_over_replayed_text(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    facts = stage(with_(tiny, data={"replay": 0.5}), tiny_run, tmp_path).audit()
    assert 0 < facts["share"] < 1


def test_held_out_prompts_are_not_trained_on(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(20)]
    for name, part in (("train", rows), ("valid", rows[5:9])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    source = {
        "name": "jsonl", "kind": "instruct", "path": str(tmp_path / "train.jsonl"),
        "validation_path": str(tmp_path / "valid.jsonl"),
    }  # fmt: skip
    made = stage(with_(tiny, sft={"data": [source]}), tiny_run, tmp_path)

    def prompts(store: TokenStore) -> set[str]:
        return {tokenizer.decode(store.record(i)[0].tolist()) for i in range(len(store))}

    held_out = {f"Say {n}." for n in range(5, 9)}
    assert prompts(made.validation_store) == held_out
    assert prompts(made.store) & held_out == set()
    # The test split has no file of its own and is cut from the training file by hash.
    assert 10 <= len(made.store) <= 16
    assert made.store.counts.dropped["prompt is in another split"] >= 1


def test_the_model_trains_with_dropout(tiny: PipelineConfig, tiny_run: Any, tmp_path: Path) -> None:
    made = stage(with_(tiny, model={"dropout": 0.5}), tiny_run, tmp_path)
    model = made.build_model()
    assert model.training
    batch = made.loader().batches(0)[0]
    with torch.no_grad():
        first, second = (made.objective()(model, batch).loss_sum.item() for _ in range(2))
        assert first != second
        model.eval()
        first, second = (made.objective()(model, batch).loss_sum.item() for _ in range(2))
    assert first == second


def test_the_stage_learns_its_answers(tiny: PipelineConfig, tiny_run: Any, tmp_path: Path) -> None:
    training = {**tiny.sft.training.model_dump(mode="json"), "max_steps": 30, "lr": 1e-2}
    config = with_(tiny, sft={"training": training})
    made = stage(config, tiny_run, tmp_path)
    made.execute()
    rows = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.5
    assert losses[0] == pytest.approx(math.log(tiny.model.vocab_size), abs=0.6)

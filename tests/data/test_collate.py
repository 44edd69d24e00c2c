from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.data.collate import IGNORE, TokenBatch, collate_answers, collate_pairs
from modern_llm.data.store import TokenStore, build_store

PAIRS = [([1, 9, 8, 2], [11, 12, 3], [21, 3]), ([1, 2], [13, 3], [22, 23, 24, 3])]
PAD = 0
Make = Callable[..., TokenStore]


@pytest.fixture
def store(tmp_path: Path) -> Make:
    def make(segments: tuple[str, ...], records: list[Any], **options: Any) -> TokenStore:
        return build_store(
            tmp_path,
            segments=segments,
            key={},
            records=iter(records),
            n_vocab=300,
            pad_id=PAD,
            **options,
        )

    return make


def pair_store(store: Make) -> TokenStore:
    return store(("prompt", "chosen", "rejected"), PAIRS)


def test_pair_rows(store: Make) -> None:
    batch = collate_pairs(pair_store(store), [1, 0])
    assert batch.tokens_BT.shape == (2, 16)  # 9 rounded up to a multiple of 8
    assert batch.index_B.tolist() == [1, 0]
    assert batch.tokens_BT[1].tolist() == [1, 9, 8, 2, 11, 12, 3, 21, 3] + [PAD] * 7
    assert batch.part_BT[1].tolist() == [0] * 4 + [1] * 3 + [2] * 2 + [-1] * 7
    assert batch.pos_BT[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5] + [0] * 7
    assert batch.n_tokens == 17


def test_pair_mask_is_what_two_rows_would_see(store: Make) -> None:
    batch = collate_pairs(pair_store(store), [0, 1])
    causal = torch.ones(16, 16).tril().bool()
    visible_BTS = batch.mask() & causal
    for row, (prompt, chosen, _) in enumerate(PAIRS):
        p, c = len(prompt), len(chosen)
        for t in range(16):
            part = int(batch.part_BT[row, t])
            seen = set(visible_BTS[row, t].nonzero().flatten().tolist())
            if part in (0, 1):
                assert seen == set(range(t + 1))
            elif part == 2:
                assert seen == set(range(p)) | set(range(p + c, t + 1))
            else:
                assert t in seen


def test_pair_targets_match_two_separate_rows(store: Make) -> None:
    batch = collate_pairs(pair_store(store), [0, 1])
    targets = batch.targets()
    found: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    width = batch.tokens_BT.shape[1]
    for at, label, row, rejected in zip(
        *(getattr(targets, f"{name}_M").tolist() for name in ("at", "label", "row", "rejected")),
        strict=True,
    ):
        assert at // width == row
        found.setdefault((row, rejected), []).append((int(batch.tokens_BT[row, at % width]), label))
    for row, (prompt, *answers) in enumerate(PAIRS):
        for rejected, answer in zip((False, True), answers, strict=True):
            whole = prompt + answer
            expected = [(whole[i - 1], whole[i]) for i in range(len(prompt), len(whole))]
            assert found[row, rejected] == expected


def test_answer_rows(store: Make) -> None:
    records = [([1, 5, 2], [7, 8, 3], 1.0), ([1, 2], [9, 3], 0.0)]
    batch = collate_answers(store(("prompt", "answer"), records, columns=("label",)), [0, 1])
    assert batch.tokens_BT.tolist() == [[1, 5, 2, 7, 8, 3, PAD, PAD], [1, 2, 9, 3] + [PAD] * 4]
    assert batch.labels_BT[0].tolist() == [IGNORE, IGNORE, 7, 8, 3, IGNORE, IGNORE, IGNORE]
    assert batch.labels_BT[1].tolist() == [IGNORE, 9, 3] + [IGNORE] * 5
    assert batch.answer_BT[0].nonzero().flatten().tolist() == [3, 4, 5]
    assert batch.lengths_B.tolist() == [6, 4]
    assert batch.label_B.tolist() == [1.0, 0.0] and batch.label_B.dtype == torch.float32
    assert batch.n_tokens == 10


def test_full_width_row_wraps_no_label(store: Make) -> None:
    records = [([1, 5, 2], [7, 8, 9, 4, 3], 1.0)]
    batch = collate_answers(store(("prompt", "answer"), records, columns=("label",)), [0])
    assert batch.labels_BT[0].tolist() == [IGNORE, IGNORE, 7, 8, 9, 4, 3, IGNORE]


def test_to_moves_every_tensor_and_keeps_none(store: Make) -> None:
    batch = collate_pairs(pair_store(store), [0]).to("meta")
    assert batch.tokens_BT.device.type == batch.index_B.device.type == "meta"
    text = TokenBatch(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
    assert text.to("cpu").doc_ids_BT is None and text.n_tokens == 6

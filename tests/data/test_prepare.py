from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import DataConfig
from modern_llm.data.prepare import (
    instruct_store,
    pair_store,
    prompt_hash,
    prompt_hashes,
    solution_store,
    text_store,
)
from modern_llm.data.sources import RowCounts, Source
from modern_llm.data.templates import Turn, answer_ids, prompt_ids
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import ConfigError, DataError


class Fixed(Source):
    """Rows given by a test; ``None`` is a malformed one."""

    def __init__(self, kind: str, rows: list[dict[str, Any] | None], name: str = "fixed") -> None:
        self.kind, self._rows, self.description = kind, rows, name

    def rows(self, split: str, counts: RowCounts | None = None) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            if row is not None:
                yield row
            elif counts is not None:
                counts.malformed("no field", "here:1")

    def fingerprint(self, split: str = "train") -> str:
        return f"{self._rows}{split}"


def decoded(tokenizer: Tokenizer, ids: Any) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special=False)


def test_text_store(tokenizer: Tokenizer, data: DataConfig) -> None:
    texts = ["Tom has 3 apples.", "typed <|eos|> stays"]
    sources = [Fixed("text", [{"text": t}], name=t[:3]) for t in texts]
    store = text_store(sources, "train", tokenizer, data)
    assert store.tokens.tolist() == [
        i for t in texts for i in (tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id)
    ]
    assert store.tokens.tolist().count(tokenizer.eos_id) == 2
    assert [s["source"] for s in store.sources] == ["Tom", "typ"]
    assert sum(s["tokens"] for s in store.sources) == store.n_tokens
    assert text_store(sources, "train", tokenizer, data, max_rows=1).folder != store.folder


def test_instruct_rows_are_prompt_then_answer(tokenizer: Tokenizer, data: DataConfig) -> None:
    rows = [
        {"prompt": "Copy: a", "answer": "a"},
        {"prompt": [Turn("user", "x"), Turn("assistant", "y"), Turn("user", "z")], "answer": "w"},
    ]
    problems = [{"question": "1 + 1?", "answer": "1 + 1 = 2.\n#### 2"}]
    sources = [Fixed("instruct", rows), Fixed("problems", problems)]
    store = instruct_store(sources, "train", tokenizer, data, max_tokens=100)
    for i, row in enumerate([*rows, *problems]):
        prompt, answer = store.record(i)
        asked = row["question"] if "question" in row else row["prompt"]
        assert prompt.tolist() == prompt_ids(tokenizer, asked)
        assert answer.tolist() == answer_ids(tokenizer, row["answer"])


@pytest.mark.parametrize("max_tokens", range(4, 60, 3))
def test_instruct_truncation(tokenizer: Tokenizer, data: DataConfig, max_tokens: int) -> None:
    rows = [{"prompt": "one two three four five " * n, "answer": "six " * n} for n in (1, 2, 4)]
    whole = [(prompt_ids(tokenizer, r["prompt"]), answer_ids(tokenizer, r["answer"])) for r in rows]
    try:
        store = instruct_store(
            [Fixed("instruct", rows)], "train", tokenizer, data, max_tokens=max_tokens
        )
    except DataError as error:
        assert "answer too long" in str(error)  # every row
        return
    assert len(store) + store.counts.dropped.get("answer too long", 0) == 3
    for i in range(len(store)):
        prompt, answer = (s.tolist() for s in store.record(i))
        assert len(prompt) + len(answer) <= max_tokens
        full = next(p for p, a in whole if a == answer)  # an answer is never cut
        assert prompt[:2] == full[:2] and prompt[2:] == full[len(full) - len(prompt) + 2 :]
        assert answer[-1] == tokenizer.eos_id


@pytest.mark.parametrize("room", [3, 4, 20])
def test_answers_are_kept_where_a_token_of_the_prompt_fits(
    tokenizer: Tokenizer, data: DataConfig, room: int
) -> None:
    rows = [{"prompt": "x", "answer": "y"}, {"prompt": "one two three " * 30, "answer": "six " * 9}]
    max_tokens = len(answer_ids(tokenizer, rows[1]["answer"])) + room
    store = instruct_store(
        [Fixed("instruct", rows)], "train", tokenizer, data, max_tokens=max_tokens
    )
    assert store.counts.dropped == ({"answer too long": 1} if room == 3 else {})
    if room > 3:
        assert len(store.record(1)[0]) == room


def test_excluded_prompts_are_dropped(tokenizer: Tokenizer, data: DataConfig) -> None:
    held_out = Fixed("problems", [{"question": "a?", "answer": "1"}])
    rows = [{"prompt": "a? ", "answer": "x"}, {"prompt": "b?", "answer": "y"}]
    exclude = prompt_hashes([held_out], "test")
    assert exclude == {prompt_hash("a?")}
    store = instruct_store(
        [Fixed("instruct", rows)], "train", tokenizer, data, max_tokens=64, exclude=exclude
    )
    assert store.counts.dropped == {"prompt is in another split": 1}
    assert "b?" in decoded(tokenizer, store.record(0)[0])


def test_pairs_are_cut_by_their_own_budgets(tokenizer: Tokenizer, data: DataConfig) -> None:
    rows = [
        {"prompt": "p " * 40, "chosen": "good " * 40, "rejected": "bad"},
        {"prompt": "q", "chosen": "same " * 30 + "a", "rejected": "same " * 30 + "b"},
        {"prompt": "r", "chosen": "yes", "rejected": "no"},
    ]
    store = pair_store(
        [Fixed("pairs", rows)], "train", tokenizer, data, max_prompt=12, max_answer=8
    )
    assert store.counts.dropped == {"equal answers after truncation": 1}
    prompt, chosen, rejected = (s.tolist() for s in store.record(0))
    assert len(prompt) == 12 and prompt[-1] == tokenizer.assistant_id
    assert prompt[:2] == [tokenizer.bos_id, tokenizer.user_id]
    assert len(chosen) == 8 and tokenizer.eos_id not in chosen
    assert rejected == answer_ids(tokenizer, "bad")
    assert store.record(1)[1].tolist() == answer_ids(tokenizer, "yes")
    with pytest.raises(ConfigError, match="max_answer_tokens"):
        pair_store([Fixed("pairs", rows)], "train", tokenizer, data, max_prompt=12, max_answer=1)


def test_solutions(tokenizer: Tokenizer, data: DataConfig) -> None:
    rows = [
        ("q", "1 + 1 = 2.\n#### 2", 1.0),
        ("q", "7 " * 40, 1.0),
        ("x" * 99 + "the end?", "#### 3", 0.0),
    ]
    options = {"key": {"policy": "a"}, "max_tokens": 40}
    store = solution_store(rows, tokenizer, data, **options)
    assert store.columns["label"].tolist() == [1.0, 0.0]
    assert store.counts.dropped == {"too long": 1}  # a solution is never cut
    prompt, answer = (ids.tolist() for ids in store.record(1))  # a question is, from its start
    assert answer == answer_ids(tokenizer, "#### 3")
    assert len(prompt) + len(answer) == 40
    assert prompt[:2] == [tokenizer.bos_id, tokenizer.user_id]
    assert tokenizer.decode(prompt).endswith("the end?")

    def unread() -> Iterator[tuple[str, str, float]]:
        raise AssertionError("read again")
        yield

    assert solution_store(unread(), tokenizer, data, **options).fingerprint == store.fingerprint


def test_malformed_rows_are_counted_then_refused(tokenizer: Tokenizer, data: DataConfig) -> None:
    good = {"text": "fine"}
    store = text_store([Fixed("text", [None, good, None])], "train", tokenizer, data)
    assert store.counts.dropped == {"malformed": 2}
    assert store.sources[0]["dropped"] == {"malformed": 2}
    with pytest.raises(DataError, match=r"here:1: no field; 3 malformed rows.*max_bad_rows=2"):
        text_store([Fixed("text", [None, good, None, None])], "train", tokenizer, data)


def test_a_lower_limit_of_malformed_rows_holds_for_a_store_that_stands(
    tokenizer: Tokenizer, data: DataConfig
) -> None:
    sources = [Fixed("text", [{"text": "good"}]), Fixed("text", [None, {"text": "fine"}, None])]
    first = text_store(sources, "train", tokenizer, data)
    assert text_store(sources, "train", tokenizer, data).folder == first.folder
    strict = data.model_copy(update={"max_bad_rows": 1})
    told = r"fixed, train split: 2 malformed rows are more than data.max_bad_rows=1"
    with pytest.raises(DataError, match=told):
        text_store(sources, "train", tokenizer, strict)


def test_wrong_kind_is_refused(tokenizer: Tokenizer, data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="rows of kind 'text', needed here: pairs"):
        pair_store([Fixed("text", [])], "train", tokenizer, data, max_prompt=8, max_answer=8)


def test_another_tokenizer_gives_another_store(
    tokenizer: Tokenizer, data: DataConfig, tmp_path: Path
) -> None:
    from modern_llm.config import TokenizerConfig
    from modern_llm.data.tokenizer import build_tokenizer

    other = build_tokenizer(
        TokenizerConfig(name="char"), vocab_size=400, texts=lambda: iter(["abc"]), data=data
    )
    source = Fixed("text", [{"text": "abc"}])
    stores = [text_store([source], "train", t, data) for t in (tokenizer, other)]
    assert stores[0].folder != stores[1].folder

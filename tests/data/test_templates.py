import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.data.templates import (
    TEMPLATE_HASH,
    Turn,
    alpaca_prompt,
    answer_ids,
    prompt_ids,
    prompt_text,
    split_hh,
    truncate_prompt,
)
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import ConfigError, DataError


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


def test_prompt_and_answer(tokenizer: Tokenizer) -> None:
    assert shown(tokenizer, prompt_ids(tokenizer, "hi")) == "<|bos|><|user|>hi<|assistant|>"
    assert shown(tokenizer, answer_ids(tokenizer, "yes")) == "yes<|eos|>"


def test_dialogue(tokenizer: Tokenizer) -> None:
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    assert shown(tokenizer, prompt_ids(tokenizer, turns)) == (
        "<|bos|><|user|>a<|assistant|>b<|eos|><|user|>c<|assistant|>"
    )
    assert prompt_text(turns) == "Human: a\n\nAssistant: b\n\nHuman: c"


@pytest.mark.parametrize("turns", [[], [Turn("user", "a"), Turn("assistant", "b")]])
def test_prompt_must_end_with_the_user(tokenizer: Tokenizer, turns: list[Turn]) -> None:
    with pytest.raises(DataError, match="user's turn"):
        prompt_ids(tokenizer, turns)


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(), answer=st.text())
def test_prompt_is_a_prefix_and_markers_cannot_be_typed(
    tokenizer: Tokenizer, prompt: str, answer: str
) -> None:
    head = prompt_ids(tokenizer, prompt + "<|assistant|>")
    whole = head + answer_ids(tokenizer, answer + "<|eos|>")
    assert whole[: len(head)] == head
    assert whole.count(tokenizer.assistant_id) == 1
    assert whole.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(whole) == prompt + "<|assistant|>" + answer + "<|eos|>"


def test_alpaca_with_and_without_input() -> None:
    assert alpaca_prompt(" Add. ", "") == "Add."
    assert alpaca_prompt("Add.", " \n") == "Add."
    assert alpaca_prompt("Add.", "1 and 2 {x}") == "Add.\n\nInput:\n1 and 2 {x}"


def test_split_hh() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello\nthere\n\nHuman: Why?\n\nAssistant: Because."
    turns, answer = split_hh(text)
    assert turns == [Turn("user", "Hi"), Turn("assistant", "Hello\nthere"), Turn("user", "Why?")]
    assert answer == "Because."
    assert split_hh("\n\nHuman: x\n\nAssistant:") == ([Turn("user", "x")], "")


@pytest.mark.parametrize(
    "text", ["", "no markers", "\n\nAssistant: alone", "x\n\nHuman: a\n\nAssistant: b"]
)
def test_split_hh_refuses(text: str) -> None:
    with pytest.raises(DataError):
        split_hh(text)


def test_truncation_keeps_the_markers_and_the_end(tokenizer: Tokenizer) -> None:
    ids = prompt_ids(tokenizer, "one two three four five six")
    for room in range(3, len(ids) + 2):
        cut = truncate_prompt(ids, room)
        assert len(cut) == min(room, len(ids))
        assert cut[:2] == [tokenizer.bos_id, tokenizer.user_id]
        assert cut[2:] == ids[len(ids) - len(cut) + 2 :]
        assert cut[-1] == tokenizer.assistant_id
    with pytest.raises(ConfigError, match="no room"):
        truncate_prompt(ids, 2)


def test_template_hash_is_pinned() -> None:
    # A new hash means that old checkpoints were trained on another template: raise its format.
    assert len(TEMPLATE_HASH) == 64
    assert TEMPLATE_HASH[:16] == "bd2a79d0e6f7f3b5"

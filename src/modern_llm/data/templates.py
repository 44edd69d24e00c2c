"""How prompts and answers become token segments: one module for training, evaluation and chat.

    <|bos|><|user|>question<|assistant|>answer<|eos|>

and, for a dialogue, ``<|bos|><|user|>..<|assistant|>..<|eos|><|user|>..<|assistant|>``. Prompt and
answer are encoded apart and joined as ids, so the prompt's ids are a prefix of the whole by
construction. The markers are ids, not text: nobody can type one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from modern_llm.data.tokenizer import SPECIALS, Tokenizer
from modern_llm.errors import ConfigError, DataError
from modern_llm.runtime.artifacts import sha256_json

ALPACA_WITH_INPUT = "{instruction}\n\nInput:\n{input}"
ALPACA_WITHOUT_INPUT = "{instruction}"
MIN_PROMPT_TOKENS = 3  # the markers around a prompt
HH_USER, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue."""

    role: Literal["user", "assistant"]
    text: str


Prompt = str | Sequence[Turn]  # a question, or a dialogue that ends with the user's turn


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Prompt of an Alpaca row, with or without an input."""
    if not input.strip():
        return ALPACA_WITHOUT_INPUT.format(instruction=instruction.strip())
    return ALPACA_WITH_INPUT.format(instruction=instruction.strip(), input=input.strip())


def split_hh(dialogue: str) -> tuple[list[Turn], str]:
    r"""Turns before the last assistant marker of an HH-RLHF dialogue, and the last answer.

    Raises:
        DataError: the text is not ``\n\nHuman: .. \n\nAssistant: ..`` in turns.
    """
    head, marker, answer = dialogue.rpartition(HH_ASSISTANT)
    if not marker:
        raise DataError("no assistant turn in the dialogue")
    turns: list[Turn] = []
    rest = head
    while rest:
        roles: list[tuple[Literal["user", "assistant"], str]]
        roles = [("user", HH_USER), ("assistant", HH_ASSISTANT)]
        role, mark = next((r for r in roles if rest.startswith(r[1])), (None, ""))
        if role is None:
            raise DataError("the dialogue does not begin with a human or assistant turn")
        rest = rest[len(mark) :]
        ends = [end for _, m in roles if (end := rest.find(m)) >= 0]
        end = min(ends, default=len(rest))
        turns.append(Turn(role, rest[:end].strip()))
        rest = rest[end:]
    if not turns or turns[-1].role != "user":
        raise DataError("the last answer does not follow a human turn")
    return turns, answer.strip()


def prompt_text(prompt: Prompt) -> str:
    """A prompt as readable text; equal texts are equal prompts (used to split and to compare)."""
    if isinstance(prompt, str):
        return prompt
    marks = {"user": HH_USER, "assistant": HH_ASSISTANT}
    return "".join(f"{marks[turn.role]} {turn.text}" for turn in prompt).strip()


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids up to and with the marker after which the assistant answers.

    Raises:
        DataError: a dialogue that does not end with the user's turn.
    """
    return prompts_ids(tokenizer, [prompt])[0]


def prompts_ids(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """`prompt_ids` of many prompts in one call of the tokenizer."""
    dialogues = [[Turn("user", p)] if isinstance(p, str) else list(p) for p in prompts]
    for turns in dialogues:
        if not turns or turns[-1].role != "user":
            raise DataError("a prompt must end with the user's turn")
    texts = iter(tokenizer.encode_batch([turn.text for turns in dialogues for turn in turns]))
    rows = []
    for turns in dialogues:
        ids = [tokenizer.bos_id]
        for turn in turns:
            if turn.role == "user":
                ids += [tokenizer.user_id, *next(texts)]
            else:
                ids += [tokenizer.assistant_id, *next(texts), tokenizer.eos_id]
        rows.append([*ids, tokenizer.assistant_id])
    return rows


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Ids of an answer with the closing ``<|eos|>``."""
    return [*tokenizer.encode(answer), tokenizer.eos_id]


def truncate_prompt(ids: list[int], max_tokens: int) -> list[int]:
    """Cut a prompt from its start; its first two ids (``<|bos|><|user|>``) stay.

    Raises:
        ConfigError: ``max_tokens`` leaves no room for the markers.
    """
    if max_tokens < MIN_PROMPT_TOKENS:
        raise ConfigError(f"max_prompt_tokens={max_tokens} has no room for the three markers")
    return ids if len(ids) <= max_tokens else [*ids[:2], *ids[2 - max_tokens :]]


TEMPLATE_HASH = sha256_json(
    {
        "format": 1,
        "specials": SPECIALS,
        "alpaca": [ALPACA_WITHOUT_INPUT, ALPACA_WITH_INPUT],
        "prompt": "bos (user text | assistant text eos)* assistant",
        "answer": "text eos",
        "text": "bos text eos",
    }
)

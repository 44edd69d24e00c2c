"""What becomes of the rows of each kind: ids by the template, what is cut, what is left out.

An encoder is a value that another process can be given, so that rows are encoded in parallel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modern_llm.data.templates import MIN_PROMPT_TOKENS, Prompt, prompts_ids, truncate_prompt
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.data.writer import Record

Row = dict[str, Any]
Encode = Callable[[list[Row]], Iterator["Record | str"]]  # a record, or the reason to drop the row


@dataclass(frozen=True)
class TextEncoder:
    """Pretraining documents, ``<|bos|> text <|eos|>``."""

    tokenizer: Tokenizer

    def __call__(self, rows: list[Row]) -> Iterator[Record]:
        """One record a row."""
        tokenizer = self.tokenizer
        for ids in tokenizer.encode_batch([row["text"] for row in rows]):
            yield ([tokenizer.bos_id, *ids, tokenizer.eos_id],)


@dataclass(frozen=True)
class InstructEncoder:
    """Prompts and answers; a prompt is cut from its start, an answer never."""

    tokenizer: Tokenizer
    max_tokens: int

    def __call__(self, rows: list[Row]) -> Iterator[Record | str]:
        """A record or a reason for each row."""
        prompts = prompts_ids(self.tokenizer, [prompt_of(row) for row in rows])
        answers = self.tokenizer.encode_batch([row["answer"] for row in rows])
        for prompt, ids in zip(prompts, answers, strict=True):
            answer = [*ids, self.tokenizer.eos_id]
            room = self.max_tokens - len(answer)
            if len(prompt) <= room:
                yield prompt, answer
            elif room > MIN_PROMPT_TOKENS:
                yield truncate_prompt(prompt, room), answer
            else:
                yield "answer too long"


@dataclass(frozen=True)
class PairEncoder:
    """Prompts with two answers; the prompt is cut from its start, then each answer at its end."""

    tokenizer: Tokenizer
    max_prompt: int
    max_answer: int

    def __call__(self, rows: list[Row]) -> Iterator[Record | str]:
        """A record or a reason for each row."""
        prompts = prompts_ids(self.tokenizer, [row["prompt"] for row in rows])
        chosen = self.tokenizer.encode_batch([row["chosen"] for row in rows])
        rejected = self.tokenizer.encode_batch([row["rejected"] for row in rows])
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
            pair = tuple([*i, self.tokenizer.eos_id][: self.max_answer] for i in (good, bad))
            if pair[0] == pair[1]:
                yield "equal answers after truncation"
            elif not (good and bad):
                yield "empty answer"
            else:
                yield truncate_prompt(prompt, self.max_prompt), *pair


def prompt_of(row: Row) -> Prompt:
    """Prompt of an instruction or a pair, question of a problem."""
    prompt: Prompt = row["question"] if "question" in row else row["prompt"]
    return prompt

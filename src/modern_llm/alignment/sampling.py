"""Answers of a policy to prompts: seeded, the same whatever else is sampled beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modern_llm.data.templates import Prompt, prompt_text, prompts_ids, truncate_prompt
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.models import Completion, ModernDecoderLM, generate
from modern_llm.runtime.devices import autocast
from modern_llm.runtime.seeding import derive_seed

SAMPLE_BATCH = 256  # rows that are decoded together
COMPLETION_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Answer:
    """One answer as it was drawn.

    Attributes:
        prompt: ids that it follows.
        tokens: its ids, without EOS.
        finished: True when it ended with EOS, False when it ran out of tokens.
    """

    prompt: list[int]
    tokens: list[int]
    finished: bool


def sample_ids(
    model: ModernDecoderLM,
    tokenizer: Tokenizer,
    rows: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: list[int] | None = None,
    precision: str = "fp32",
) -> list[list[int]]:
    """One continuation of each row of ids, without EOS; a row's seed alone decides its draws."""
    done = _complete(
        model, tokenizer, rows,
        max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds, precision=precision,
    )  # fmt: skip
    return [completion.tokens for completion in done]


def sample_answers(
    model: ModernDecoderLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    n_samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    precision: str = "fp32",
) -> list[list[Answer]]:
    """``n_samples`` answers to each prompt.

    The seed of an answer comes from ``seed``, the prompt's text and the answer's number. A prompt
    that leaves no room for ``max_new_tokens`` is cut from its start.
    """
    room = model.config.max_seq_len - max_new_tokens
    rows, seeds = [], []
    for prompt, ids in zip(prompts, prompts_ids(tokenizer, prompts), strict=True):
        rows += [truncate_prompt(ids, room)] * n_samples
        seeds += [derive_seed(seed, prompt_text(prompt), k) for k in range(n_samples)]
    done = _complete(
        model, tokenizer, rows,
        max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds, precision=precision,
    )  # fmt: skip
    answers = [Answer(row, c.tokens, c.finished) for row, c in zip(rows, done, strict=True)]
    return [answers[i : i + n_samples] for i in range(0, len(answers), n_samples)]


def sample_texts(
    model: ModernDecoderLM, tokenizer: Tokenizer, prompts: Sequence[Prompt], **options: Any
) -> list[list[str]]:
    """`sample_answers`, which has the options, as text."""
    groups = sample_answers(model, tokenizer, prompts, **options)
    return [[tokenizer.decode(answer.tokens) for answer in group] for group in groups]


def _complete(
    model: ModernDecoderLM,
    tokenizer: Tokenizer,
    rows: list[list[int]],
    *,
    precision: str,
    **options: Any,
) -> list[Completion]:
    with autocast(next(model.parameters()).device, precision):
        return generate(
            model, rows, **options,
            eos_id=tokenizer.eos_id, n_vocab=tokenizer.n_vocab, batch_size=SAMPLE_BATCH,
        )  # fmt: skip


def continue_text(
    model: ModernDecoderLM,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int,
    precision: str = "fp32",
) -> str:
    """What the model goes on with after plain text, drawn with a fixed seed.

    A text that leaves no room for ``max_new_tokens`` is cut from its start.
    """
    room = model.config.max_seq_len - max_new_tokens - 1
    ids = tokenizer.encode(text)
    row = [tokenizer.bos_id, *ids[max(0, len(ids) - room) :]]
    (done,) = sample_ids(
        model, tokenizer, [row],
        max_new_tokens=max_new_tokens, temperature=COMPLETION_TEMPERATURE, seeds=[0],
        precision=precision,
    )  # fmt: skip
    return tokenizer.decode(done)

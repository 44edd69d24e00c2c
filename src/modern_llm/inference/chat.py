"""A model in the terminal: what it is, samples of it, and a dialogue with it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from modern_llm.data.templates import Turn, prompt_ids
from modern_llm.inference.session import Sampler, Session, timed_reply

HELP = "clear begins anew, quit leaves"
HELP_PLAIN = "each line is continued on its own; quit leaves"
BEGINNINGS = ("Once upon a time", "The", "In the year")  # to be continued after pretraining
QUESTIONS = ("Say hello.", "Tell me a short story.", "What is 3 + 4?")  # for a chat

Write = Callable[[str], None]


def ask(prompt: str) -> str:
    """A line of standard input; the prompt is shown in a terminal only."""
    return input(prompt if sys.stdin.isatty() else "")


def introduce(session: Session, *, write: Write = print) -> None:
    """Show what the model is."""
    for name, fact in session.facts().items():
        write(f"{name:>11}  {fact}")


def show_samples(
    session: Session,
    prompts: Sequence[str] = (),
    *,
    sampler: Sampler,
    plain: bool = False,
    write: Write = print,
) -> None:
    """Show what each prompt is answered or continued with, and how fast.

    Args:
        session: the model.
        prompts: by default some that suit the model.
        sampler: how answers are drawn; each prompt has its own seed.
        plain: continue the texts as they are.
        write: shows a line.
    """
    for i, prompt in enumerate(prompts or (BEGINNINGS if plain else QUESTIONS)):
        own = replace(sampler, seed=sampler.seed + i)
        reply, speed = timed_reply(session, prompt, own, plain=plain)
        write(f"\n> {prompt}\n{reply.text}\n{speed}")


def chat(
    session: Session,
    *,
    sampler: Sampler | None = None,
    plain: bool = False,
    read: Callable[[str], str] = ask,
    write: Write = print,
) -> None:
    """Answer line after line until ``quit`` or the end of the input; empty lines are passed over.

    Turns that no longer fit the context are forgotten, the oldest first. Ctrl-C stops an answer,
    and at the prompt leaves.

    Args:
        session: the model.
        sampler: how answers are drawn; each turn has its own seed.
        plain: continue each line as it is, without the chat template and what was said before.
        read: asks for a line; raises ``EOFError`` at the end.
        write: shows a line.
    """
    sampler = sampler or Sampler(temperature=0.7)
    write(HELP_PLAIN if plain else HELP)
    turns: list[Turn] = []
    count = 0
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("")
            return
        command = line.removeprefix("/")
        if command == "quit":
            return
        if command == "clear":
            turns = []
            write("(begun anew)")
        elif line.startswith("/"):
            write(f"unknown command {line}: {HELP}")
        elif line:
            asked = remembered(session, [*turns, Turn("user", line)], sampler)
            own = replace(sampler, seed=sampler.seed + count)
            try:
                reply, speed = timed_reply(session, line if plain else asked, own, plain=plain)
            except KeyboardInterrupt:
                write("(stopped)")
                continue
            count += 1
            if not plain:
                turns = [*asked, Turn("assistant", reply.text)]
            write(f"{reply.text}\n{speed}")


def remembered(session: Session, turns: list[Turn], sampler: Sampler) -> list[Turn]:
    """The newest turns that leave room for an answer, at least the last; the first is a user's."""
    room = session.room(sampler)
    while len(turns) > 2 and len(prompt_ids(session.tokenizer, turns)) > room:
        turns = turns[2:]
    return turns

"""A dialogue in the terminal."""

from collections.abc import Callable
from dataclasses import replace

from modern_llm.data.templates import Turn, prompt_ids
from modern_llm.inference.session import Sampler, Session, timed_reply

HELP = "/clear begins anew, /quit leaves"


def chat(
    session: Session,
    *,
    sampler: Sampler | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> None:
    """Answer line after line until ``/quit`` or the end of the input.

    Turns that no longer fit the context are forgotten, the oldest first. Ctrl-C stops an answer,
    and at the prompt leaves.

    Args:
        session: the model.
        sampler: how answers are drawn; each turn has its own seed.
        read: asks for a line; raises ``EOFError`` at the end.
        write: shows a line.
    """
    sampler = sampler or Sampler(temperature=0.7)
    for name, fact in session.facts().items():
        write(f"{name:>11}  {fact}")
    write(HELP)
    turns: list[Turn] = []
    count = 0
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line == "/clear":
            turns = []
            write("(begun anew)")
        elif line.startswith("/"):
            write(f"unknown command {line}: {HELP}")
        elif line:
            asked = remembered(session, [*turns, Turn("user", line)], sampler)
            try:
                own = replace(sampler, seed=sampler.seed + count)
                reply, speed = timed_reply(session, asked, own)
            except KeyboardInterrupt:
                write("(stopped)")
                continue
            count += 1
            turns = [*asked, Turn("assistant", reply.text)]
            ending = "" if reply.finished else ", cut"
            write(reply.text)
            write(f"({reply.n_tokens} tokens, {speed:.0f} tokens/s{ending})")


def remembered(session: Session, turns: list[Turn], sampler: Sampler) -> list[Turn]:
    """The newest turns that leave room for an answer, at least the last; the first is a user's."""
    room = session.room(sampler)
    while len(turns) > 2 and len(prompt_ids(session.tokenizer, turns)) > room:
        turns = turns[2:]
    return turns

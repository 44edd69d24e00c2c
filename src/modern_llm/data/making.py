"""How token stores and tokenizers come about: in how many processes, or only looked for.

The settings hold for all that is made inside `making`, so that a run, ``prepare-data`` and its
``--check`` ask for their data by the very same calls.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

SHARD_TOKENS = 1 << 26  # 128 MB at two bytes a token: 150 shards are 10 billion tokens


@dataclass(frozen=True)
class Making:
    """Settings of all that is made.

    Attributes:
        jobs: processes that encode; 1 is this one, with the tokenizer's own threads.
        shard_tokens: a shard is closed when it has as many.
        build: make what is missing; else it is an error.
        repair: set aside what is damaged and make it anew; else it is an error.
        verify: hash all files of what stands, not only those whose time changed.
    """

    jobs: int = 1
    shard_tokens: int = SHARD_TOKENS
    build: bool = True
    repair: bool = False
    verify: bool = False


_current: ContextVar[Making] = ContextVar("making", default=Making())  # noqa: B039 - frozen


def current() -> Making:
    """The settings that hold here."""
    return _current.get()


@contextmanager
def making(settings: Making) -> Iterator[None]:
    """Let ``settings`` hold inside the block."""
    token = _current.set(settings)
    try:
        yield
    finally:
        _current.reset(token)

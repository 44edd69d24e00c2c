"""Random draws whose values are fixed by `random.Random.getrandbits` alone.

Python promises the same bits for a seed in every version, but not the same ``randrange``,
``choice`` or ``shuffle``; these are built on the bits.
"""

import random
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

T = TypeVar("T")


def below(rng: random.Random, n: int) -> int:
    """Uniform integer in ``[0, n)``, by rejection."""
    bits = n.bit_length()
    while (value := rng.getrandbits(bits)) >= n:
        pass
    return value


def between(rng: random.Random, low: int, high: int) -> int:
    """Uniform integer in ``[low, high]``."""
    return low + below(rng, high - low + 1)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of ``items``."""
    return items[below(rng, len(items))]


def shuffle(rng: random.Random, items: MutableSequence[T]) -> None:
    """Permute ``items`` in place (Fisher-Yates)."""
    for i in range(len(items) - 1, 0, -1):
        j = below(rng, i + 1)
        items[i], items[j] = items[j], items[i]

"""Orders that are functions of (seed, epoch, position): nothing to store, nothing to restore."""

import numpy as np
from numpy.typing import NDArray

from modern_llm.runtime.seeding import derive_seed

Ints = NDArray[np.int64]
ROUNDS = 6


def permuted(positions: Ints, n: int, seed: int) -> Ints:
    """Places of ``positions`` in a permutation of ``0..n-1`` chosen by ``seed``.

    A Feistel network over the next power of four, walked on until it falls below ``n`` (Black and
    Rogaway 2002, "cycle walking"): a bijection in constant memory.

    Args:
        positions: int64, each in ``[0, n)``.
        n: size of the permuted range.
        seed: any integer.
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_seed("feistel", seed, r)) for r in range(ROUNDS)]
    values = positions.astype(np.uint64)
    walking = np.ones(len(values), dtype=bool)
    while walking.any():
        left, right = values[walking] >> half, values[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[walking] = (left << half) | right
        walking = values >= np.uint64(n)
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(slots: Ints, n: int, seed: int) -> Ints:
    """Rows for global slots 0, 1, 2, ...: each run of ``n`` slots has every row exactly once."""
    rows = np.empty_like(slots)
    epochs = slots // n
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permuted(slots[here] % n, n, derive_seed("epoch", seed, int(epoch)))
    return rows

"""Arithmetic word problems with short worked steps, split by problem.

Chains of operations are worked out step by step. Searches (which two things cost so much
together?) are easier to check than to solve, which gives a verifier something to add.

Two problems are the same when their operations and numbers are the same, whoever owns the apples;
the hash of that decides the split, so no wording of a held-out problem is ever trained on.
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import combinations

from modern_llm.data.draws import below, between, pick, shuffle
from modern_llm.errors import ConfigError

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Ella", "Leo", "Ruth", "Jack", "Nora")
THINGS = ("apples", "shells", "coins", "cards", "books", "stones", "cups", "pears", "toys", "pens")
GAINS = ("finds", "buys", "gets", "wins")
LOSSES = ("loses", "sells", "gives away", "drops")
HELD_OUT = {"test": 10, "validation": 10}  # percent of all problems


@dataclass(frozen=True)
class Level:
    """Sizes of one difficulty.

    Attributes:
        steps: fewest and most operations.
        largest: largest number that is added or taken away, or begun with.
        limit: largest result.
        factor: largest multiplier; 0 for no multiplication.
        searches: percent of the problems that are searches; the others are chains.
        dearest: highest price in a search.
    """

    steps: tuple[int, int]
    largest: int
    limit: int
    factor: int
    searches: int
    dearest: int


LEVELS = {
    1: Level((1, 1), 20, 40, 0, searches=0, dearest=9),
    2: Level((1, 2), 20, 40, 0, searches=40, dearest=9),
    3: Level((2, 2), 50, 99, 5, searches=40, dearest=20),
    4: Level((2, 3), 99, 200, 9, searches=40, dearest=50),
    5: Level((3, 3), 400, 999, 12, searches=40, dearest=99),
}
OFFERS = 4  # things to choose from in a search


@dataclass(frozen=True)
class Problem:
    """One problem in words, with its worked answer."""

    question: str
    answer: str
    key: str  # operations and numbers, such as "17+25-8"


def level_of(difficulty: int) -> Level:
    """The sizes of a difficulty from 1 to 5.

    Raises:
        ConfigError: there is no such difficulty.
    """
    if difficulty not in LEVELS:
        raise ConfigError(f"synthetic: difficulty={difficulty!r}: use one of {sorted(LEVELS)}")
    return LEVELS[difficulty]


def split_of(key: str) -> str:
    """The split that a problem, or an instruction, belongs to."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    for split, percent in HELD_OUT.items():
        if bucket < percent:
            return split
        bucket -= percent
    return "train"


def draw_operation(rng: random.Random, level: Level, value: int) -> tuple[str, int, int]:
    """A next operation on ``value``: sign, operand and result within the level's limits."""
    signs = "+-" + ("*" if level.factor and value >= 2 and value * 2 <= level.limit else "")
    sign = pick(rng, signs)
    if sign == "*":
        operand = between(rng, 2, min(level.factor, level.limit // value))
        return sign, operand, value * operand
    room = min(level.largest, level.limit - value)
    if (sign == "+" and room < 1) or (sign == "-" and value < 3):
        sign = "-" if sign == "+" else "+"
    if sign == "+":
        operand = between(rng, 1, room)
        return sign, operand, value + operand
    operand = between(rng, 1, min(level.largest, value - 1))
    return sign, operand, value - operand


def draw_problem(rng: random.Random, level: Level) -> Problem:
    """One problem of a level, of any split."""
    draw = draw_search if below(rng, 100) < level.searches else draw_chain
    return draw(rng, level)


def draw_search(rng: random.Random, level: Level) -> Problem:
    """Which two of four things cost a given sum; only one pair does."""
    while True:
        prices = list(range(1, level.dearest + 1))
        shuffle(rng, prices)
        prices = prices[:OFFERS]
        sums = [a + b for a, b in combinations(prices, 2)]
        unique = [pair for pair in combinations(prices, 2) if sums.count(sum(pair)) == 1]
        if unique:
            break
    dearer, cheaper = sorted(pick(rng, unique), reverse=True)
    things = list(THINGS)
    shuffle(rng, things)
    offers = [f"{thing} cost {price}" for thing, price in zip(things, prices, strict=False)]
    total = dearer + cheaper
    question = (
        f"{', '.join(offers).capitalize()}. {pick(rng, NAMES)} pays {total} for two of them. "
        "What does the dearer one cost?"
    )
    key = f"{prices} {total}"
    return Problem(question, f"{dearer} + {cheaper} = {total}.\n#### {dearer}", key)


def draw_chain(rng: random.Random, level: Level) -> Problem:
    """What someone has after a few gains and losses."""
    name, things = pick(rng, NAMES), pick(rng, THINGS)
    value = between(rng, 2, level.largest)
    sentences = [f"{name} has {value} {things}."]
    key, work = str(value), []
    for _ in range(between(rng, *level.steps)):
        sign, operand, result = draw_operation(rng, level, value)
        if sign == "*":
            sentences.append(f"Then {name} has {operand} times as many.")
        elif sign == "+":
            sentences.append(f"{name} {pick(rng, GAINS)} {operand} more.")
        else:
            sentences.append(f"{name} {pick(rng, LOSSES)} {operand}.")
        work.append(f"{value} {sign} {operand} = {result}.")
        key += f"{sign}{operand}"
        value = result
    sentences.append(f"How many {things} does {name} have now?")
    return Problem(" ".join(sentences), f"{' '.join(work)}\n#### {value}", key)

"""Generated text, instructions and worse answers, in one small vocabulary.

Built on `draws`, so the bytes are the same on every machine and Python version. Pretraining text
states sums, differences and products in signs or prose; it never asks a question in the problems'
form. The problems themselves are in `problems`.
"""

import random

from modern_llm.data.corruption import corrupt_solution
from modern_llm.data.draws import below, between, pick, shuffle
from modern_llm.data.problems import (
    GAINS,
    LOSSES,
    NAMES,
    THINGS,
    Level,
    draw_operation,
)

PLACES = ("garden", "school", "market", "river", "park", "kitchen", "beach", "farm")
ADJECTIVES = ("old", "small", "red", "blue", "round", "new", "pretty", "heavy")
FEELINGS = ("happy", "tired", "glad", "proud", "sad", "calm")
WORDS = (*THINGS, *ADJECTIVES, *PLACES)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
RUDE = (
    "Now stop asking me such silly things.",
    "Anyone with half a brain would know that.",
    "Do your own homework next time.",
    "I am tired of people like you.",
)


def story(rng: random.Random) -> str:
    """Three to six plain sentences about one person."""
    name, friend = pick(rng, NAMES), pick(rng, NAMES)
    thing, place = pick(rng, THINGS), pick(rng, PLACES)
    middle = [
        f"{name} saw {pick(rng, ADJECTIVES)} {thing} near the {place}.",
        f"The {thing} looked {pick(rng, ADJECTIVES)} and {pick(rng, ADJECTIVES)}.",
        f"{name} asked {friend} to come to the {place}.",
        f"{friend} said that the {thing} were {pick(rng, ADJECTIVES)}.",
        f"They put the {thing} on the table and counted them.",
        f"Then {name} walked home from the {place}.",
        f"{name} does not have many {thing} now.",
        f"How {pick(rng, ADJECTIVES)} the {thing} are!",
    ]
    shuffle(rng, middle)
    opening = f"One day {name} went to the {place}."
    ending = f"In the end {name} was {pick(rng, FEELINGS)}."
    return " ".join([opening, *middle[: between(rng, 1, 4)], ending])


def fact(rng: random.Random, level: Level) -> str:
    """One sum, difference or product, in signs or in prose."""
    value = between(rng, 2, level.largest)
    sign, operand, result = draw_operation(rng, level, value)
    things, name = pick(rng, THINGS), pick(rng, NAMES)
    in_signs = f"{value} {sign} {operand} = {result}."
    in_prose = {
        "+": (
            f"{value} plus {operand} is {result}.",
            f"{name} has {value} {things} and {pick(rng, GAINS)} {operand} more, "
            f"so {value} + {operand} = {result}.",
        ),
        "-": (
            f"{value} minus {operand} is {result}.",
            f"{name} has {value} {things} and {pick(rng, LOSSES)} {operand}, "
            f"so {value} - {operand} = {result}.",
        ),
        "*": (
            f"{value} times {operand} is {result}.",
            f"{name} has {value} {things} and then has {operand} times as many, "
            f"so {value} * {operand} = {result}.",
        ),
    }
    return pick(rng, (in_signs, in_signs, *in_prose[sign]))


def text_row(rng: random.Random, level: Level) -> dict[str, str]:
    """A story, a page of number facts, or both."""
    facts = [fact(rng, level) for _ in range(between(rng, 6, 14))]
    form = below(rng, 4)
    if form == 0:
        return {"text": story(rng)}
    if form == 1:
        return {"text": f"{story(rng)}\n{' '.join(facts[:4])}"}
    return {"text": " ".join(facts)}


def instruction(rng: random.Random) -> tuple[str, str]:
    """A short task on a list of words, and its answer."""
    pool = list(WORDS)
    shuffle(rng, pool)
    words = pool[: between(rng, 2, 5)]
    listing = " ".join(words)
    tasks = (
        (f"Copy these words: {listing}", listing),
        (f"Reverse this list: {listing}", " ".join(reversed(words))),
        (f"How many words are here: {listing}", NUMBER_WORDS[len(words)]),
        (f"Write the first word of: {listing}", words[0]),
        (f"Write the last word of: {listing}", words[-1]),
    )
    return pick(rng, tasks)


def rejected_answer(rng: random.Random, answer: str) -> str:
    """A worse answer: a wrong step, no steps, or a rude or rambling tail.

    For an answer without steps: a wrong word, or one of the two tails.
    """
    worked = "####" in answer
    form = below(rng, 4)
    if form == 0:
        return f"{answer} {pick(rng, RUDE)}"
    if form == 1:
        tail = [f"I also like {pick(rng, ADJECTIVES)} {pick(rng, THINGS)}." for _ in range(3)]
        return f"{answer} {' '.join(tail)}"
    if worked and form == 2:
        return corrupt_solution(answer, rng)
    if worked:
        return answer[answer.index("####") :]
    words = answer.split()
    others = [w for w in (*WORDS, *NUMBER_WORDS) if w not in words]
    words[below(rng, len(words))] = pick(rng, others)
    return " ".join(words)

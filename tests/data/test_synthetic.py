import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import pytest

from modern_llm.data.draws import below, between, pick, shuffle
from modern_llm.data.problems import LEVELS, draw_problem, draw_search, split_of
from modern_llm.data.sources import KINDS, SPLITS, RowCounts, Source
from modern_llm.errors import ConfigError, DataError

Open = Callable[..., Source]


def digest(source: Source, split: str, rows: int) -> str:
    state = hashlib.sha256()
    for _, row in zip(range(rows), source.rows(split), strict=False):
        state.update(json.dumps(row, sort_keys=True).encode())
    return state.hexdigest()[:16]


# Raise FORMAT in sources/generated.py when one of these changes on purpose.
DIGESTS = {
    "text": "c5675b1a30d9d47e",
    "instruct": "b1ebe7a573ea5e47",
    "pairs": "a35c8bf49186ccda",
    "problems": "5b062190ba87b048",
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_bytes_are_pinned(synthetic: Open, kind: str) -> None:
    found = [digest(synthetic(kind=kind, difficulty=3), split, 200) for split in SPLITS]
    assert hashlib.sha256("".join(found).encode()).hexdigest()[:16] == DIGESTS[kind]


def test_draws_use_bits_only() -> None:
    class Bits(random.Random):
        def random(self) -> float:
            raise AssertionError("random() was used")

    rng = Bits(7)
    assert Counter(below(rng, 3) for _ in range(3000)).keys() == {0, 1, 2}
    assert {between(rng, 4, 5) for _ in range(50)} == {4, 5}
    items = list(range(9))
    shuffle(rng, items)
    assert sorted(items) == list(range(9))
    assert pick(rng, "a") == "a"


QUESTIONS = (" have now?", "What does the dearer one cost?")


def solve(question: str) -> int:
    """An independent reading of a question."""
    if "dearer" in question:
        *prices, total = map(int, re.findall(r"\d+", question))
        (pair,) = (p for p in combinations(prices, 2) if sum(p) == total)  # there is only one
        return max(pair)
    value = 0
    for sentence in question.split(". "):
        numbers = re.findall(r"\d+", sentence)
        if not numbers:
            continue
        n = int(numbers[0])
        if "times as many" in sentence:
            value *= n
        elif re.search(r"finds|buys|gets|wins", sentence):
            value += n
        elif re.search(r"loses|sells|gives away|drops", sentence):
            value -= n
        else:
            value = n
    return value


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_problems_are_right(difficulty: int) -> None:
    level, rng = LEVELS[difficulty], random.Random(difficulty)
    for _ in range(400):
        problem = draw_problem(rng, level)
        steps, _, final = problem.answer.partition("\n#### ")
        assert solve(problem.question) == int(final)
        equations = steps.removesuffix(".").split(". ")
        if "dearer" in problem.question:
            assert re.fullmatch(rf"{final} \+ \d+ = \d+\.", steps)
            assert eval(steps.partition(" =")[0]) == int(steps[:-1].split()[-1])
            continue
        assert level.steps[0] <= len(equations) <= level.steps[1]
        for equation in equations:
            left, right = equation.split(" = ")
            assert re.fullmatch(r"\d+ [-+*] \d+", left)
            assert eval(left) == int(right) and 0 < int(right) <= level.limit


def numbers_and_signs(question: str) -> str:
    """Operations and numbers of a question, without its words."""
    if "dearer" in question:
        *prices, total = map(int, re.findall(r"\d+", question))
        return f"{prices} {total}"
    words = {"times": "*"} | dict.fromkeys(["finds", "buys", "gets", "wins"], "+")
    words |= dict.fromkeys(["loses", "sells", "gives", "drops"], "-")
    parts = []
    for sentence in question.split(". ")[:-1]:
        sign = next((s for w, s in words.items() if re.search(rf"\b{w}\b", sentence)), "")
        parts.append(sign + re.findall(r"\d+", sentence)[0])
    return "".join(parts)


@pytest.mark.parametrize("difficulty", [2, 5])
def test_share_of_searches(difficulty: int) -> None:
    rng = random.Random(0)
    asked = [draw_problem(rng, LEVELS[difficulty]).question for _ in range(2000)]
    share = sum("dearer" in question for question in asked) / len(asked)
    assert abs(share - LEVELS[difficulty].searches / 100) < 0.04
    prices = map(int, re.findall(r"cost (\d+)", draw_search(rng, LEVELS[difficulty]).question))
    assert len(set(prices)) == 4


@pytest.mark.parametrize("kind", ["problems", "instruct", "pairs"])
def test_splits_share_no_problem(synthetic: Open, kind: str) -> None:
    source = synthetic(kind=kind, difficulty=2, rows=6000, held_out_rows=300)
    field = "question" if kind == "problems" else "prompt"
    rows = {split: [row[field] for row in source.rows(split)] for split in SPLITS}
    prompts = {split: set(texts) for split, texts in rows.items()}
    problems = {
        split: {numbers_and_signs(t) for t in texts if t.endswith(QUESTIONS)}
        for split, texts in rows.items()
    }
    for group in (prompts, problems):
        assert not group["train"] & group["test"]
        assert not group["train"] & group["validation"]
        assert not group["validation"] & group["test"]
    assert len(problems["test"]) > 200
    for split in ("validation", "test"):  # held-out problems do not repeat
        asked = [t for t in rows[split] if t.endswith(QUESTIONS)]
        assert len({numbers_and_signs(t) for t in asked}) == len(asked)
        assert all(split_of(numbers_and_signs(t)) == split for t in asked)


def test_text_never_asks(synthetic: Open) -> None:
    rows = [row["text"] for row in synthetic(kind="text", rows=500, difficulty=3).rows("train")]
    assert not any("####" in text or "How many" in text for text in rows)
    facts = [m for t in rows for m in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", t)]
    assert len(facts) > 1000
    assert all(eval(f"{a}{op}{b}") == int(c) for a, op, b, c in facts)


def test_pairs_reject_in_turns(synthetic: Open) -> None:
    rows = list(synthetic(kind="pairs", rows=800).rows("train"))
    assert all(row["chosen"] != row["rejected"] for row in rows)
    worked = [r for r in rows if "####" in r["chosen"]]
    final = {r["prompt"]: r["chosen"].split("#### ")[1] for r in worked}
    wrong = [r for r in worked if r["rejected"].split("#### ")[1].split()[0] != final[r["prompt"]]]
    bare = [r for r in worked if r["rejected"].startswith("####")]
    tailed = [r for r in worked if r["rejected"].startswith(r["chosen"])]
    assert len(wrong) + len(bare) + len(tailed) == len(worked)
    assert min(len(wrong), len(bare), len(tailed)) > len(worked) // 8


def test_instructions_are_right(synthetic: Open) -> None:
    source = synthetic(kind="instruct", problem_share=0.0, rows=400)
    tasks = Counter()
    count = {"two": 2, "three": 3, "four": 4, "five": 5}
    for row in source.rows("train"):
        head, _, listing = row["prompt"].partition(": ")
        words, answer = listing.split(), row["answer"]
        tasks[head] += 1
        expected = {
            "Copy these words": listing,
            "Reverse this list": " ".join(words[::-1]),
            "Write the first word of": words[0],
            "Write the last word of": words[-1],
        }.get(head)
        assert answer == expected if expected is not None else count[answer] == len(words)
    assert len(tasks) == 5


def test_rows_depend_on_options(synthetic: Open) -> None:
    base = synthetic(kind="problems", rows=20)
    assert len(list(base.rows("train", RowCounts()))) == 20
    assert list(base.rows("train")) == list(synthetic(kind="problems", rows=20).rows("train"))
    others = [{"seed": 1}, {"difficulty": 3}, {"rows": 21}]
    prints = {synthetic(**{"kind": "problems", "rows": 20} | o).fingerprint() for o in others}
    assert len(prints | {base.fingerprint(), base.fingerprint("test")}) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "poems"},
        {"difficulty": 6},
        {"rows": 0},
        {"problem_share": 1.5},
        {"kind": "problems", "colour": "red"},
    ],
)
def test_bad_options(synthetic: Open, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        synthetic(**options)


def test_used_up_problems_and_unknown_split(synthetic: Open) -> None:
    with pytest.raises(ConfigError, match="only about"):
        list(synthetic(kind="problems", difficulty=1, held_out_rows=5000).rows("test"))
    with pytest.raises(DataError, match="train, validation, test"):
        list(synthetic().rows("dev"))

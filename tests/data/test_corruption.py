import json
import random
import re

import pytest

from modern_llm.config import DataConfig, SourceConfig
from modern_llm.data.corruption import corrupt_solution, solution_numbers
from modern_llm.data.problems import LEVELS, draw_chain, draw_search
from modern_llm.data.sources import open_source
from modern_llm.errors import DataError


def final(text: str) -> float:
    return float(re.search(r"####\s*(-?[\d,.]+)", text).group(1).replace(",", ""))


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_synthetic_solutions_go_wrong_in_one_step(difficulty: int) -> None:
    rng = random.Random(3)
    for _ in range(300):
        right = draw_chain(rng, LEVELS[difficulty]).answer
        wrong = corrupt_solution(right, rng)
        assert final(wrong) != final(right)
        assert re.sub(r"\d+", "N", wrong) == re.sub(r"\d+", "N", right)  # the same shape
        equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", wrong)
        bad = [e for e in equations if eval("".join(e[:3])) != int(e[3])]
        assert len(bad) == 1  # later steps follow from the wrong one
        assert int(equations[-1][3]) == final(wrong)


def test_searches_go_wrong_in_the_number_found() -> None:
    rng = random.Random(3)
    for _ in range(200):
        right = draw_search(rng, LEVELS[3]).answer
        wrong = corrupt_solution(right, rng)
        assert final(wrong) != final(right)
        assert re.sub(r"\d+", "N", wrong) == re.sub(r"\d+", "N", right)


def test_gsm8k_format_carries_the_error_on() -> None:
    right = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    seen = {corrupt_solution(right, random.Random(seed)) for seed in range(40)}
    assert len(seen) > 5
    for wrong in seen:
        step = re.search(r"<<48/2=(\d+)>>(\d+) clips", wrong)
        total = re.search(r"48\+(\d+) = <<48\+(\d+)=(\d+)>>(\d+)\.\n#### (\d+)", wrong)
        assert step and total and step.group(1) == step.group(2) == total.group(1)
        assert total.group(3) == total.group(4) == total.group(5) != "72"
        if step.group(1) != "24":
            assert int(total.group(3)) == 48 + int(step.group(1))


def test_real_gsm8k(real_data: DataConfig) -> None:
    rng = random.Random(0)
    source = open_source(SourceConfig(name="gsm8k"), real_data)
    same_steps = rows = 0
    for row in source.rows("train"):
        wrong = corrupt_solution(row["answer"], rng)
        assert final(wrong) != final(row["answer"])
        same_steps += wrong.split("####")[0] == row["answer"].split("####")[0]
        rows += 1
    assert rows > 7000
    assert same_steps / rows < 0.05  # nearly always a step is wrong, not only the last line


def test_it_is_deterministic() -> None:
    text = "17 + 25 = 42. 42 - 8 = 34.\n#### 34"
    assert corrupt_solution(text, random.Random(5)) == corrupt_solution(text, random.Random(5))


@pytest.mark.parametrize("text", ["1,200 * 2 = 2,400.\n#### 2,400", "It is so.\n#### 7", "#### 0"])
def test_other_shapes(text: str) -> None:
    for seed in range(20):
        assert final(corrupt_solution(text, random.Random(seed))) != final(text)


@pytest.mark.parametrize("text", ["17 + 25 = 42", "17 + 25 = 42.\n#### ,", "#### -,"])
def test_without_a_final_number(text: str) -> None:
    with pytest.raises(DataError, match="####"):
        corrupt_solution(text, random.Random(0))


def test_hostile_expressions_are_only_text() -> None:
    text = "9**9**9 = 3. " + "1+" * 500 + "1 = 501. 5/0 = 1.\n#### 3"
    assert final(corrupt_solution(text, random.Random(1))) != 3
    json.dumps(text)


def test_solution_numbers() -> None:
    assert [float(n) for n in solution_numbers("1,200 and 3.5, then 7.")] == [1200.0, 3.5, 7.0]

import copy
import random
from typing import Any

import pytest
import torch

from modern_llm.errors import DataError
from modern_llm.evaluation.compare import Contestant, compare
from modern_llm.evaluation.likelihood import Compute, answer_bits_per_byte, answer_nats
from modern_llm.evaluation.perplexity import perplexity
from modern_llm.evaluation.scores import NotEvaluated, Score
from modern_llm.evaluation.wikitext import detokenize


def sentences(n: int) -> list[str]:
    rng = random.Random(0)
    words = ["cats", "dogs", "eat", "see", "mice", "often"]
    return [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(n)]


def louder(model: Any, factor: float) -> Any:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.mul_(factor)
    return changed


def test_compare(toy: Any, tokenizer: Any) -> None:
    calm, loud, same = louder(toy, 0.1), louder(toy, 2.0), copy.deepcopy(toy)
    contestants = [
        Contestant(name, model, tokenizer, context)
        for name, model, context in [
            ("toy", toy, 16), ("calm", calm, 32), ("loud", loud, 16), ("same", same, 16)
        ]
    ]  # fmt: skip
    texts = [*sentences(40), ""]
    found = compare(contestants, texts, key="t")

    assert list(found.scores) == ["toy", "calm", "loud", "same"]
    alone = perplexity(calm, tokenizer, texts, key="t", context=16, stride=8)
    assert found.scores["calm"] == alone
    assert found.verdicts == {"calm": "better", "loud": "worse", "same": "not distinguishable"}
    gain = found.differences["calm"]
    expected = found.scores["calm"][-1].value - found.scores["toy"][-1].value
    assert gain.value == pytest.approx(expected)
    assert gain.ci95 is not None
    assert gain.ci95[0] < gain.value < gain.ci95[1] < 0
    assert found.differences["same"].value == 0


def test_pairing_narrows_the_interval(toy: Any, tokenizer: Any) -> None:
    near = louder(toy, 1.05)
    contestants = [Contestant("a", toy, tokenizer, 16), Contestant("b", near, tokenizer, 16)]
    found = compare(contestants, sentences(40), key="t")

    def width(score: Score) -> float:
        assert score.ci95 is not None
        return score.ci95[1] - score.ci95[0]

    assert width(found.differences["b"]) < 0.5 * width(found.scores["a"][-1])


def test_compare_by_the_harness(toy: Any, tokenizer: Any) -> None:
    found = compare(
        [Contestant("a", toy, tokenizer, 16)], ["x , y"], key="t", context=8, detokenize=detokenize
    )
    assert found.scores["a"][0].key == "t/lm-eval/ctx8/bos"
    assert found.differences == {}


def test_one_name_twice(toy: Any, tokenizer: Any) -> None:
    twice = [Contestant("a", toy, tokenizer, 16)] * 2
    with pytest.raises(DataError, match="one name"):
        compare(twice, ["x"], key="t")


def test_answer_bits_per_byte(toy: Any) -> None:
    rows = [([256, 1, 2], [3, 4, 5]), ([256, 1, 2, 7], [8, 9])]
    nats = list(answer_nats(toy, rows, Compute(), max_tokens=16))
    score = answer_bits_per_byte(toy, rows, [6, 2], Compute(), key="g", max_tokens=16)
    assert isinstance(score, Score)
    assert score.value == pytest.approx(sum(nats) / 8 / 0.6931471805599453)
    assert score.n == 2
    empty = answer_bits_per_byte(toy, [], [], Compute(), key="g", max_tokens=16)
    assert isinstance(empty, NotEvaluated)

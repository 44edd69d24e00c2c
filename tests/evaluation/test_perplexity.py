import copy
import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from modern_llm.errors import ConfigError, DataError
from modern_llm.evaluation.likelihood import Compute, Span, answer_nats, span_nats
from modern_llm.evaluation.perplexity import all_protocols, perplexity, windows
from modern_llm.evaluation.wikitext import detokenize

TEXTS = ["The cat sat on the mat.", "", "a", "Dogs, it is said, dream of cats; cats of nothing."]


def slow_nats(model: Any, tokens: list[int], context: int, stride: int) -> list[float]:
    """One forward a token in float64, the window of each token worked out on its own."""
    exact = copy.deepcopy(model).eval().double()
    last = len(tokens) - 1
    nats = []
    for i in range(1, len(tokens)):
        later = max(0, math.ceil((i - context) / stride))  # windows after the first
        end = min(context + later * stride, last)
        seen = torch.tensor([tokens[max(0, end - context) : i]])
        with torch.no_grad():
            logits_V = exact(seen, at_M=torch.tensor([seen.shape[1] - 1]))[0]
        nats.append(-float(torch.log_softmax(logits_V, dim=0)[tokens[i]]))
    return nats


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 4), (8, 1), (7, 3), (64, 32)])
def test_against_one_token_at_a_time(toy: Any, tokenizer: Any, context: int, stride: int) -> None:
    documents = [tokenizer.encode(text) for text in TEXTS if text]
    expected = [slow_nats(toy, [256, *ids], context, stride) for ids in documents]
    total = sum(map(sum, expected))
    count = sum(map(len, documents))

    scores = perplexity(toy, tokenizer, TEXTS, key="toy", context=context, stride=stride)

    token, word, bits = scores
    assert token.metric == "token_perplexity"
    assert token.value == pytest.approx(math.exp(total / count), rel=1e-6)
    assert token.n == count == sum(map(len, expected))
    words = 6 + 1 + 10  # pieces between white space of the three texts
    assert word.n == words
    assert word.value == pytest.approx(math.exp(total / words), rel=1e-5)
    assert bits.value == pytest.approx(total / math.log(2) / count, rel=1e-6)  # a token is a byte
    assert {s.key for s in scores} == {f"toy/ctx{context}/stride{stride}/bos"}
    assert all(s.ci95 and s.ci95[0] <= s.value <= s.ci95[1] for s in scores)
    assert "3 documents" in token.note
    assert toy.longest <= context


def test_batch_1_equals_batch_8(toy: Any, tokenizer: Any) -> None:
    one, eight = (
        perplexity(toy, tokenizer, TEXTS * 3, key="t", context=8, compute=Compute(batch_size=b))
        for b in (1, 8)
    )
    assert toy.rows == 8
    for a, b in zip(one, eight, strict=True):
        assert a.n == b.n
        assert a.value == pytest.approx(b.value, rel=1e-6)
        assert a.ci95 == pytest.approx(b.ci95, rel=1e-6)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 16, 17, 30])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_each_token_is_scored_once(length: int, stride: int) -> None:
    tokens = list(range(length))
    scored: list[int] = []
    for span in windows(tokens, context=8, stride=stride):
        assert len(span.tokens) - 1 <= 8
        scored += span.tokens[-span.n_scored :]
    assert scored == tokens[1:]


@pytest.mark.parametrize(
    ("length", "context", "context_len", "expected"),
    [
        # Printed by lm-evaluation-harness 0.4.13: make_disjoint_window over
        # get_rolling_token_windows(list(range(length)), prefix_token=-1, max_seq_len=context,
        # context_len=context_len)
        (10, 4, 1, [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]),
        (11, 4, 2, [([-1], [0, 1, 2, 3]), ([2, 3], [4, 5, 6]), ([5, 6], [7, 8, 9]),
                    ([6, 7, 8, 9], [10])]),
        (3, 4, 1, [([-1], [0, 1, 2])]),
        (4, 4, 1, [([-1], [0, 1, 2, 3])]),
        (5, 4, 1, [([-1], [0, 1, 2, 3]), ([0, 1, 2, 3], [4])]),
        (9, 4, 3, [([-1], [0, 1, 2, 3]), ([1, 2, 3], [4, 5]), ([3, 4, 5], [6, 7]),
                   ([4, 5, 6, 7], [8])]),
        (12, 4, 1, [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([7], [8, 9, 10, 11])]),
    ],
)  # fmt: skip
def test_windows_are_those_of_the_harness(
    length: int, context: int, context_len: int, expected: list[tuple[list[int], list[int]]]
) -> None:
    stride = context - context_len + 1
    spans = windows([-1, *range(length)], context=context, stride=stride)
    pairs = [(list(s.tokens[: -s.n_scored]), list(s.tokens[-s.n_scored :])) for s in spans]
    assert pairs == expected


def test_without_bos_the_first_token_is_not_scored(toy: Any, tokenizer_without_bos: Any) -> None:
    token, *_ = perplexity(toy, tokenizer_without_bos, ["hello", "x"], key="t", context=8)
    assert token.key == "t/ctx8/stride8/nobos"
    assert token.n == 4
    expected = slow_nats(toy, list(b"hello"), 8, 8)
    assert token.value == pytest.approx(math.exp(sum(expected) / 4), rel=1e-6)


def test_single_document_draws_windows(toy: Any, tokenizer: Any) -> None:
    token, word, bits = perplexity(toy, tokenizer, ["ab cd " * 20], key="t", context=8)
    assert "1 document; interval: bootstrap over its 15 windows" in token.note
    for score in (token, word, bits):
        assert score.ci95 is not None
        assert score.ci95[0] < score.value < score.ci95[1]
    (one, *_) = perplexity(toy, tokenizer, ["abc"], key="t", context=8)
    assert one.ci95 is None  # one window: no spread to measure


def test_lm_eval_protocol(toy: Any, tokenizer: Any) -> None:
    page = " = Cats = \n \n They eat 1 @,@ 000 mice , often . \n"
    scores = perplexity(toy, tokenizer, [page], key="w", context=8, detokenize=detokenize)
    scored = detokenize(page)
    assert scored == " = Cats =\n\nThey eat 1,000 mice, often.\n"
    total = sum(slow_nats(toy, [256, *scored.encode()], 8, 8))
    _, word, bits = scores
    assert word.key == "w/lm-eval/ctx8/bos"
    assert word.n == 14  # words of the page as given, the empty ones at its ends included
    assert word.value == pytest.approx(math.exp(total / 14), rel=1e-5)
    assert bits.value == pytest.approx(total / math.log(2) / len(page.encode()), rel=1e-6)


def test_all_protocols(toy: Any, tokenizer: Any) -> None:
    scores = all_protocols(toy, tokenizer, ["one <unk> two"], key="w", context=8)
    assert [s.key for s in scores[::3]] == ["w/ctx8/stride8/bos", "w/ctx8/stride4/bos"]
    assert "<unk>" in scores[0].note


def test_mode_is_put_back_and_dropout_is_off(toy: Any, tokenizer: Any) -> None:
    toy.train()
    first = perplexity(toy, tokenizer, TEXTS, key="t", context=8)
    assert toy.training
    assert first == perplexity(toy.eval(), tokenizer, TEXTS, key="t", context=8)
    assert not toy.training


def test_bf16_is_close(toy: Any, tokenizer: Any) -> None:
    exact, *_ = perplexity(toy, tokenizer, TEXTS, key="t", context=8)
    compute = Compute(precision="bf16")
    rough, *_ = perplexity(toy, tokenizer, TEXTS, key="t", context=8, compute=compute)
    assert rough.value != exact.value
    assert math.log(rough.value) == pytest.approx(math.log(exact.value), rel=0.02)


def test_texts_stream(toy: Any, tokenizer: Any) -> None:
    """Memory stays far below the text, which nobody holds."""

    def texts() -> Iterator[str]:
        for _ in range(60):
            yield "x" * 20_000

    class Constant(torch.nn.Module):
        def forward(self, tokens_BT: torch.Tensor, *, at_M: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(at_M), 257)

    compute = Compute(batch_size=2)
    tracemalloc.start()
    token, *_ = perplexity(Constant(), tokenizer, texts(), key="t", context=512, compute=compute)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert token.n == 60 * 20_000
    assert token.value == pytest.approx(257, rel=1e-6)
    assert peak < 1_500_000  # the ids of all texts as a list would take 9.6 MB


def test_bad_calls(toy: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="stride=9 must be from 1 to context=8"):
        perplexity(toy, tokenizer, TEXTS, key="t", context=8, stride=9)
    with pytest.raises(DataError, match="no text to score"):
        perplexity(toy, tokenizer, ["", ""], key="t", context=8)
    with pytest.raises(ValueError, match="2 scored tokens in a span of 2"):
        list(span_nats(toy, [Span([1, 2], 2)], Compute()))


def test_answer_nats(toy: Any) -> None:
    rows = [([256, 1, 2, 3], [4, 5]), ([256, 1, *range(40), 9], [7, 8, 9]), ([256, 1, 2], [3] * 30)]
    nats = list(answer_nats(toy, rows, Compute(batch_size=2), max_tokens=12))
    exact = copy.deepcopy(toy).eval().double()

    def slow(prompt: list[int], answer: list[int]) -> float:
        total = 0.0
        for i, target in enumerate(answer):
            seen = torch.tensor([prompt + answer[:i]])
            assert seen.shape[1] <= 12
            logits_V = exact(seen, at_M=torch.tensor([seen.shape[1] - 1]))[0]
            total -= float(torch.log_softmax(logits_V.detach(), 0)[target])
        return total

    assert nats[0] == pytest.approx(slow([256, 1, 2, 3], [4, 5]), rel=1e-6)
    # 12 fed and 1 predicted: 10 of the prompt, its two markers kept and its start cut
    assert nats[1] == pytest.approx(slow([256, 1, *range(33, 40), 9], [7, 8, 9]), rel=1e-6)
    assert nats[2] == pytest.approx(slow([256, 1, 2], [3] * 10), rel=1e-6)

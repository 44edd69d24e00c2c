import itertools
import time
from collections import Counter

import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM, generate
from modern_llm.models.generate import Sampling


def make(**changes: object) -> ModernDecoderLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32)
    model = ModernDecoderLM(ModelConfig(**{**sizes, "init_std": 0.3, **changes}))
    torch.nn.init.normal_(model.final_norm.weight)  # untied from the last token: varied text
    return model


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [1, 2, 3], [11, 12]]


def slow_greedy(model: ModernDecoderLM, prompt: list[int], n_new: int, eos: int) -> list[int]:
    """A full forward a token, no cache, no batch."""
    model.eval()
    text = list(prompt)
    for _ in range(min(n_new, model.config.max_seq_len - len(prompt))):
        token = model(torch.tensor([text]))[0, -1].argmax().item()
        if token == eos:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"position": "learned"}, {"attention": "window", "window": 4, "n_sinks": 1}],
    ids=str,
)
def test_greedy_equals_a_full_forward_a_token(changes: dict, batch_size: int | None) -> None:
    model = make(**changes)
    done = generate(model, PROMPTS, max_new_tokens=12, eos_id=0, batch_size=batch_size)
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.tokens == slow_greedy(model, prompt, 12, eos=0)
        assert completion.finished is (len(completion.tokens) < 12)


def test_eos_stops_its_row_only() -> None:
    model = make()
    free = generate(model, PROMPTS, max_new_tokens=10, eos_id=None)
    eos = free[1].tokens[4]
    for completion, without in zip(
        generate(model, PROMPTS, max_new_tokens=10, eos_id=eos), free, strict=True
    ):
        expected = list(itertools.takewhile(lambda t: t != eos, without.tokens))
        assert completion.tokens == expected
        assert completion.finished is (eos in without.tokens)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}], ids=str
)
def test_a_row_depends_on_its_prompt_and_seed_only(options: dict) -> None:
    model = make()
    seeds = [3, 1, 4, 1, 5]
    common = {"max_new_tokens": 15, "eos_id": 0, "temperature": 1.0, **options}
    together = generate(model, PROMPTS, seeds=seeds, **common)
    alone = [
        generate(model, [p], seeds=[s], **common)[0] for p, s in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    backwards = generate(model, PROMPTS[::-1], seeds=seeds[::-1], batch_size=2, **common)
    assert backwards[::-1] == together
    other = generate(model, PROMPTS, seeds=[s + 1 for s in seeds], **common)
    assert other != together
    again = generate(model, [PROMPTS[0]] * 8, seeds=list(range(8)), **common)
    assert len({tuple(c.tokens) for c in again}) > 4  # equal prompts, their own seeds


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 3.0]]).expand(20_000, 5)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def shares(**options: object) -> list[float]:
        counts = Counter(Sampling(**options).draw(logits, uniform).tolist())
        return [counts[i] / 20_000 for i in range(5)]

    half = (logits[0] / 0.5).softmax(0)
    assert shares(temperature=0.5) == pytest.approx(half.tolist(), abs=0.015)
    assert shares(temperature=0.0) == [0, 0, 0, 0, 1]
    top = torch.tensor([0, 0, 2.0, 0, 3.0]).exp() * torch.tensor([0, 0, 1, 0, 1])
    assert shares(temperature=1.0, top_k=2) == pytest.approx((top / top.sum()).tolist(), abs=0.015)
    # 0.636 + 0.234 = 0.870: the two likeliest first reach 0.7, three are needed for 0.9.
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx(
        (top / top.sum()).tolist(), abs=0.015
    )
    assert [s > 0 for s in shares(temperature=1.0, top_p=0.9)] == [False, True, True, False, True]
    everything = shares(temperature=1.0)
    assert shares(temperature=1.0, top_k=99) == everything
    assert shares(temperature=1.0, top_k=0, top_p=1.0) == everything
    assert shares(temperature=1.0, top_p=1e-9) == [0, 0, 0, 0, 1]
    assert shares(temperature=1.0, n_vocab=4)[4] == 0
    assert shares(temperature=0.0, n_vocab=2) == [0, 1, 0, 0, 0]


def test_a_draw_at_the_end_of_the_interval_is_possible() -> None:
    logits = torch.tensor([[0.0, 0.0, -1e9, -1e9]])
    almost_one = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert Sampling(temperature=1.0).draw(logits, almost_one).item() == 1


def test_rows_end_at_the_context() -> None:
    model = make(max_seq_len=8)
    done = generate(model, PROMPTS, max_new_tokens=50, eos_id=None)
    assert [len(p) + len(c.tokens) for p, c in zip(PROMPTS, done, strict=True)] == [8] * 5
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.tokens == slow_greedy(model, prompt, 50, eos=-1)
        assert not completion.finished


def test_a_window_streams_beyond_the_context() -> None:
    """Equal to the cache fed one token at a time; long and short prompts in one call."""
    model = make(max_seq_len=8, attention="window", window=4, n_sinks=2)
    prompts = [[1, 2, 3], [4], list(range(1, 13)), [4]]
    done = generate(model, prompts, max_new_tokens=20, eos_id=None)
    model.eval()
    for prompt, completion in zip(prompts, done, strict=True):
        cache = model.new_streaming_cache()
        text = list(prompt)
        for i in range(len(prompt) + 19):
            logits = model(torch.tensor([[text[i]]]), cache=cache)
            if i >= len(prompt) - 1:
                text.append(logits[0, -1].argmax().item())
        assert completion.tokens == text[len(prompt) :]


def test_mode_and_gradients_are_left_alone() -> None:
    model = make(dropout=0.5)
    first = generate(model.train(), PROMPTS, max_new_tokens=5, eos_id=0)
    assert model.training
    assert first == generate(model.eval(), PROMPTS, max_new_tokens=5, eos_id=0)
    assert not model.training


def test_refusals() -> None:
    model = make()
    ask = {"max_new_tokens": 2, "eos_id": 0}
    with pytest.raises(ConfigError, match=r"temperature=-1 .*; top_k=-1 .*; top_p=0"):
        generate(model, [[1]], temperature=-1, top_k=-1, top_p=0, **ask)
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        generate(model, [[1], []], **ask)
    with pytest.raises(ConfigError, match="prompt 0 has 32 tokens"):
        generate(model, [[1] * 32], **ask)
    with pytest.raises(ConfigError, match="1 seeds for 2 prompts"):
        generate(model, [[1], [2]], seeds=[0], **ask)
    assert generate(model, [], **ask) == []
    assert generate(model, [[1]], max_new_tokens=0, eos_id=0)[0].tokens == []


@pytest.mark.slow
def test_sampling_is_fast_enough_for_a_verifier() -> None:
    """200 problems x 8 samples x 60 tokens of a 1 M model in 60 s of processor time."""
    torch.manual_seed(0)
    model = ModernDecoderLM(
        ModelConfig(vocab_size=1024, d_model=128, n_layers=4, n_heads=4, max_seq_len=256)
    )
    rng = torch.Generator().manual_seed(0)
    problems = [torch.randint(0, 1024, (40 + i % 20,), generator=rng).tolist() for i in range(200)]
    prompts = [problem for problem in problems for _ in range(8)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    start = time.process_time()
    try:
        generate(model, prompts, max_new_tokens=60, eos_id=None, temperature=0.7)
    finally:
        torch.set_num_threads(threads)
    assert time.process_time() - start < 60

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.preferences import pair_logprobs
from modern_llm.alignment.sampling import Answer
from modern_llm.alignment.suite import Suite
from modern_llm.config import PipelineConfig
from modern_llm.data.collate import collate_pairs
from modern_llm.data.prepare import pair_store
from modern_llm.data.sources import open_source
from modern_llm.data.templates import answer_ids, prompt_ids
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.evaluation.scores import NotEvaluated, Result, Score
from modern_llm.evaluation.wikitext import count_words, detokenize
from modern_llm.models import ModernDecoderLM

PAGES = [
    " = Red pens = \n \n Tom has 3 red pens , and Anna has 4 . \n They count them @-@ twice . \n ",
    " = Blue cups = \n \n The cups ( blue ) are Anna 's . \n \n = = Cups = = \n \n Ben has 2 . \n ",
]


def with_eval(config: PipelineConfig, root: Path | None = None, **tasks: Any) -> PipelineConfig:
    raw = config.model_dump(mode="json")
    raw["eval"] = {"device": "cpu", "batch_size": 4, "threads": 1, "sample_tokens": 4, **tasks}
    raw["data"] = {**raw["data"], "root": root and str(root)}
    return PipelineConfig.model_validate(raw)


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir(parents=True)
    for name in ("wiki.test.raw", "wiki.valid.raw", "wiki.test.tokens"):
        (folder / name).write_text("\n".join(PAGES) + "\n")
    return folder.parent


def scores(results: list[Result]) -> dict[tuple[str, str], Score]:
    return {(r.key, r.metric): r for r in results if isinstance(r, Score)}


def slow_nats(model: ModernDecoderLM, ids: list[int], context: int, stride: int) -> float:
    """Each token but the first once, in float64; a window sees ``context`` tokens at most.

    The first scores all that it sees, the next ones ``stride`` more; the last ends with the text.
    """
    ends = [min(context, len(ids) - 1)]
    while ends[-1] < len(ids) - 1:
        ends.append(min(ends[-1] + stride, len(ids) - 1))
    total = 0.0
    with torch.no_grad():
        for before, end in zip([0, *ends], ends):  # noqa: B905
            begin = max(0, end - context)
            logprob = model(torch.tensor([ids[begin:end]]))[0].double().log_softmax(-1)
            scored = range(before + 1, end + 1)
            total -= sum(logprob[at - 1 - begin, ids[at]].item() for at in scored)
    return total


def test_wikitext_is_scored_as_one_stretch_and_by_page(
    tiny: PipelineConfig, wikitext: Path, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    task = {"source": "wikitext2-raw", "split": "test", "context": 32}
    suite = Suite(with_eval(tiny, wikitext, perplexity=[task]))
    found = scores(suite.perplexity(policy, tokenizer, policy.config.max_seq_len))
    keys = {key for key, _ in found}
    assert keys == {
        "wikitext2-raw.test/ctx32/stride32/bos",
        "wikitext2-raw.test/ctx32/stride16/bos",
        "wikitext2-raw.test/lm-eval/ctx32/bos",
    }
    assert {metric for _, metric in found} == {
        "token_perplexity", "word_perplexity", "bits_per_byte"
    }  # fmt: skip

    whole = "\n".join(PAGES) + "\n"
    ids = [tokenizer.bos_id, *tokenizer.encode(whole)]
    for stride in (32, 16):
        nats = slow_nats(policy, ids, 32, stride)
        key = f"wikitext2-raw.test/ctx32/stride{stride}/bos"
        token = found[key, "token_perplexity"]
        assert token.n == len(ids) - 1
        assert token.value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
        bits = found[key, "bits_per_byte"]
        assert bits.n == len(whole.encode())
        assert bits.value == pytest.approx(nats / len(whole.encode()) / math.log(2), rel=1e-5)

    nats = 0.0
    rows = [row["text"] for row in suite.read(suite.tasks.perplexity[0], None)[1]]
    for page in rows:
        page_ids = [tokenizer.bos_id, *tokenizer.encode(detokenize(page))]
        nats += slow_nats(policy, page_ids, 32, 32)
    word = found["wikitext2-raw.test/lm-eval/ctx32/bos", "word_perplexity"]
    n_words = sum(count_words(page) for page in rows)
    assert word.n == n_words
    assert word.value == pytest.approx(math.exp(nats / n_words), rel=1e-5)


def test_pages_joined_are_the_published_text(
    tiny: PipelineConfig, wikitext: Path, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    """Nothing is lost or added where pages meet: the bytes scored are those of the file."""
    task = {"source": "wikitext2", "split": "test"}
    suite = Suite(with_eval(tiny, wikitext, perplexity=[task]))
    found = scores(suite.perplexity(policy, tokenizer, 64))
    size = (wikitext / "wikitext2" / "wiki.test.tokens").stat().st_size
    assert found["wikitext2.test/ctx64/stride64/bos", "bits_per_byte"].n == size


def test_other_text_is_scored_document_by_document(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    suite = Suite(tiny)
    found = scores(suite.perplexity(policy, tokenizer, policy.config.max_seq_len))
    assert {key for key, _ in found} == {
        "synthetic.test/ctx128/stride128/bos", "synthetic.test/ctx128/stride64/bos"
    }  # fmt: skip
    task = tiny.eval.perplexity[0]
    texts = [row["text"] for row in open_source(task.source, tiny.data).rows("test")]
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        nats, tokens = nats + slow_nats(policy, ids, 128, 128), tokens + len(ids) - 1
    score = found["synthetic.test/ctx128/stride128/bos", "token_perplexity"]
    assert score.n == tokens
    assert score.value == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_do_not_depend_on_the_batch(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer, batch_size: int,
    tiny_run: Any,
) -> None:  # fmt: skip
    raw = tiny.model_dump(mode="json")
    raw["eval"]["batch_size"] = batch_size
    found = Suite(PipelineConfig.model_validate(raw)).evaluate(policy, tokenizer)
    saved = json.loads((tiny_run.run / "eval" / "result.json").read_text())["models"][1]
    assert saved["stage"] == "sft"
    assert found.samples == saved["samples"]
    expected = {(s["key"], s["metric"]): (s["value"], s["n"]) for s in saved["scores"]}
    actual = {name: (score.value, score.n) for name, score in scores(found.results).items()}
    assert actual.keys() == expected.keys()
    for name, (value, n) in expected.items():
        assert actual[name][1] == n
        assert actual[name][0] == pytest.approx(value, rel=1e-6), name


def test_gold_answers_are_scored_given_their_questions(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    suite = Suite(tiny)
    assert tiny.eval.reasoning is not None
    found = scores(suite.greedy(policy, tokenizer, tiny.eval.reasoning))
    nats = n_bytes = 0.0
    with torch.no_grad():
        for row in suite.problems[1]:
            prompt = prompt_ids(tokenizer, row["question"])
            answer = answer_ids(tokenizer, row["answer"])
            logprob = policy(torch.tensor([prompt + answer]))[0].double().log_softmax(-1)
            nats -= sum(logprob[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer))
            n_bytes += len(row["answer"].encode())
    score = found["synthetic.test/first4/gold+eos", "bits_per_byte"]
    assert score.value == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
    exact = found["synthetic.test/first4/greedy", "exact_match"]
    assert exact.n == 4 and exact.ci95 is not None


def test_preference_accuracy_is_that_of_the_pairs(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    results, pairs_P2 = Suite(tiny).preference(policy, tokenizer, None)
    task = tiny.eval.preference
    assert task is not None
    store = pair_store(
        [open_source(task.source, tiny.data)], "test", tokenizer, tiny.data,
        max_prompt=64, max_answer=16, max_rows=500,
    )  # fmt: skip
    with torch.no_grad():
        values = pair_logprobs(policy, collate_pairs(store, range(len(store))))
    torch.testing.assert_close(torch.from_numpy(pairs_P2), values, rtol=1e-5, atol=1e-5)
    score = scores(results)["synthetic.test", "preference_accuracy"]
    assert score.n == len(store)
    assert score.value == pytest.approx((values[:, 0] > values[:, 1]).float().mean().item())


def test_implicit_reward_needs_the_model_before(tiny_run: Any) -> None:
    models = json.loads((tiny_run.run / "eval" / "result.json").read_text())["models"]
    metrics = {m["stage"]: {s["metric"] for s in m["scores"]} for m in models}
    assert "implicit_reward_accuracy" in metrics["dpo"]
    assert "implicit_reward_accuracy" not in metrics["sft"] | metrics["pretrain"]


# --- what cannot be had says why


def test_a_baseline_from_a_folder(
    tiny: PipelineConfig, gpt2_folder: Path, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    suite = Suite(tiny)
    found = scores(suite.baseline(str(gpt2_folder)))
    keys = {key for key, _ in found}  # its own context, shorter than ours
    assert keys == {"synthetic.test/ctx32/stride32/bos", "synthetic.test/ctx32/stride16/bos"}
    ours = scores(suite.perplexity(policy, tokenizer, 32))
    key = ("synthetic.test/ctx32/stride32/bos", "bits_per_byte")
    assert found[key].n == ours[key].n  # the same bytes, whatever the tokenizer


def test_a_baseline_out_of_reach_is_told_and_has_no_number(
    tiny: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (missing,) = Suite(tiny).baseline("gpt2-of-nobody")
    assert isinstance(missing, NotEvaluated)
    assert missing.what == "baseline gpt2-of-nobody"
    assert "there is no local copy" in missing.why


def test_a_metric_out_of_reach_is_told(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = {"name": "synthetic", "kind": "instruct", "rows": 20, "held_out_rows": 4}
    task = {"metric": str(tmp_path / "no_metric"), "source": source, "max_new_tokens": 4}
    suite = Suite(with_eval(tiny, text_metrics=[task]))
    found = suite.evaluate(policy, tokenizer).results
    (missing,) = (r for r in found if isinstance(r, NotEvaluated))
    assert "no_metric" in missing.what and "local copy" in missing.why


@pytest.mark.usefixtures("metric_cache")
def test_a_local_metric_is_computed(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "same_length"
    folder.mkdir()
    (folder / "same_length.py").write_text(METRIC)
    source = {"name": "synthetic", "kind": "problems", "rows": 20, "held_out_rows": 4}
    task = {"metric": str(folder), "source": source, "max_rows": 3, "max_new_tokens": 4}
    found = scores(Suite(with_eval(tiny, text_metrics=[task])).text_metrics(policy, tokenizer))
    (score,) = found.values()
    assert score.metric == "same_length" and score.n == 3
    assert 0 <= score.value <= 1


METRIC = """
import datasets
import evaluate


class SameLength(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        same = [len(p) == len(r) for p, r in zip(predictions, references)]
        return {"same_length": sum(same) / len(same)}
"""


def test_reasoning_without_a_right_sample_is_not_evaluable(tiny_run: Any) -> None:
    """pass@N = 0 is told as what could not be evaluated, not as a score of a method."""
    result = json.loads((tiny_run.run / "eval" / "result.json").read_text())
    reasoning = result["reasoning"]
    assert reasoning["policy"] == "dpo" and reasoning["n_problems"] == 4
    if reasoning["base_rate"] == 0:
        assert reasoning["curves"] is None
        why = {row["what"]: row["why"] for row in result["not_evaluated"]}
        assert any("best-of-n" in what and "right" in why[what] for what in why)


def test_samples_stand_side_by_side(tiny_run: Any) -> None:
    models = json.loads((tiny_run.run / "eval" / "result.json").read_text())["models"]
    asked = [[(s["task"], s["prompt"]) for s in m["samples"]] for m in models]
    assert asked[0] == asked[1] == asked[2]
    assert [task for task, _ in asked[0]] == ["prompt", *["problem"] * 3, "completion"]


def test_a_suite_without_tasks_finds_nothing(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    found = Suite(with_eval(tiny)).evaluate(policy, tokenizer)
    assert (found.results, found.samples, found.pair_logprobs) == ([], [], None)


@pytest.mark.parametrize(
    ("limit", "key", "n"),
    [
        (3, "synthetic.test/first3", 3), (8, "synthetic.test", 8), (9, "synthetic.test", 8),
        (None, "synthetic.test", 8),
    ],
)  # fmt: skip
def test_a_limit_that_cuts_the_split_is_in_the_key(
    tiny: PipelineConfig, limit: int | None, key: str, n: int
) -> None:
    named, rows = Suite(tiny).read(tiny.eval.perplexity[0], limit)
    assert (named, len(rows)) == (key, n)


def test_every_task_tells_its_data_and_its_limit(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Constant:
        def compute(self, **kwargs: Any) -> dict[str, float]:
            return {"one": 1.0}

    monkeypatch.setattr(pytest.importorskip("evaluate"), "load", lambda name: Constant())
    sources = {k: {"name": "synthetic", "kind": k, "rows": 40, "held_out_rows": 8}
               for k in ("text", "problems", "pairs", "instruct")}  # fmt: skip
    config = with_eval(
        tiny,
        perplexity=[{"name": "mine", "source": sources["text"], "max_texts": 2}],
        reasoning={"name": "sums", "source": sources["problems"], "n_problems": 3,
                   "max_new_tokens": 4},
        preference={"name": "taste", "source": sources["pairs"], "max_pairs": 7},
        text_metrics=[{"name": "told", "source": sources["instruct"], "max_rows": 2,
                       "metric": "constant", "max_new_tokens": 4}],
    )  # fmt: skip
    found = scores(Suite(config).evaluate(policy, tokenizer).results)
    assert {key for key, _ in found} == {
        "mine.test/first2/ctx128/stride128/bos", "mine.test/first2/ctx128/stride64/bos",
        "sums.test/first3/greedy", "sums.test/first3/gold+eos", "taste.test/first7",
        "told.test/first2/greedy/constant",
    }  # fmt: skip


def test_two_files_have_two_scores(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tasks = []
    for name, text in (("a", "Tom has 3 pens."), ("b", "xyz 98765 #")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"text": text}) + "\n")
        source = {"name": "jsonl", "path": str(path), "test_path": str(path)}
        tasks.append({"name": name, "source": source, "context": 32})
    found = scores(Suite(with_eval(tiny, perplexity=tasks)).perplexity(policy, tokenizer, 128))
    one, other = (
        found[f"{name}.test/ctx32/stride32/bos", "bits_per_byte"].value for name in ("a", "b")
    )
    assert one != other


def test_a_sample_is_scored_as_it_was_drawn(
    tiny: PipelineConfig, policy: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    """By its own tokens, which its text may not give back; EOS only where it was drawn."""
    prompt = prompt_ids(tokenizer, "How many?")
    word = tokenizer.encode("Tom has")
    letters = [i for char in "Tom has" for i in tokenizer.encode(char)]
    assert letters != word and tokenizer.decode(letters) == tokenizer.decode(word)
    answers = [Answer(prompt, ids, done) for ids in (word, letters) for done in (True, False)]
    expected = []
    for answer in answers:
        ids = answer.tokens + [tokenizer.eos_id] * answer.finished
        with torch.no_grad():
            logprob = policy(torch.tensor([prompt + ids]))[0].double().log_softmax(-1)
        expected.append(sum(logprob[len(prompt) - 1 + i, t].item() for i, t in enumerate(ids)))
    assert Suite(tiny).logprobs(policy, tokenizer, answers) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 4

import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.stages import verifier as module
from modern_llm.alignment.stages.verifier import (
    VerifierObjective,
    VerifierStage,
    load_verifier,
    score_solutions,
    top_up,
)
from modern_llm.config import ModelConfig, PipelineConfig, VerifierConfig
from modern_llm.data.collate import collate_answers
from modern_llm.data.sources import open_source
from modern_llm.data.store import TokenStore
from modern_llm.data.templates import answer_ids, prompt_ids
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import CheckpointError, DataError
from modern_llm.evaluation.answers import extract_answer, gold_answer
from modern_llm.evaluation.intervals import share_interval
from modern_llm.models import VerifierModel
from modern_llm.training.checkpoint import read_checkpoint

RECORDS = [  # prompt, answer with its end, label
    ([5, 6, 7], [8, 9, 1], 1.0),
    ([5, 6, 7, 10, 11, 12, 13], [1], 0.0),
    ([14, 6, 7], [8, 9, 20, 21, 22, 23, 15, 1], 0.0),
    ([5, 16, 7, 8], [9, 1], 1.0),
]
Verifiers = Callable[..., VerifierModel]


@pytest.fixture
def make_verifier(make_config: Callable[..., ModelConfig]) -> Verifiers:
    def make(**changes: Any) -> VerifierModel:
        torch.manual_seed(3)
        return VerifierModel(make_config(**changes)).eval()

    return make


@pytest.fixture
def solutions(make_store: Callable[..., TokenStore]) -> TokenStore:
    return make_store(RECORDS, ("prompt", "answer"), columns=("label",))


def slow_terms(
    model: VerifierModel, prompt: list[int], answer: list[int], label: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Correctness loss, LM loss and count of right signs of one solution, token by token."""
    row = torch.tensor([prompt + answer])
    logprob_TV = model.trunk(row)[0].double().log_softmax(-1)
    head_T = model.value_head(model.trunk.hidden(row))[0, :, 0].double()
    value_loss, lm_loss = logprob_TV.new_zeros(()), logprob_TV.new_zeros(())
    right, seen = 0, []
    for i, token in enumerate(answer):
        at = len(prompt) + i
        seen.append(logprob_TV[at - 1, token])
        value = head_T[at] + torch.stack(seen).min()
        p = torch.sigmoid(value)
        value_loss = value_loss - torch.log(p if label else 1 - p)
        right += int((value > 0) == (label == 1.0))
        if label:  # a wrong solution is no text to imitate
            lm_loss = lm_loss - seen[-1]
    return value_loss, lm_loss, right


# --- objective


@pytest.mark.parametrize("lm_coef", [0.0, 0.3])
@pytest.mark.parametrize("rows", [[0], [1, 2], [3, 0, 2, 1]])
def test_objective_matches_a_row_at_a_time(
    make_verifier: Verifiers, solutions: TokenStore, rows: list[int], lm_coef: float
) -> None:
    model = make_verifier()
    batch, objective = collate_answers(solutions, rows), VerifierObjective(lm_coef)
    terms = objective(model, batch)
    terms.loss_sum.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    slow = [slow_terms(model, *RECORDS[i]) for i in rows]
    value, lm, right = (sum(column) for column in zip(*slow, strict=True))
    total = value + lm_coef * lm
    total.backward()

    n_tokens = sum(len(RECORDS[i][1]) for i in rows)
    assert objective.units(batch) == n_tokens
    assert terms.loss_sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert terms.metrics["value_loss"].item() == pytest.approx(value.item(), rel=1e-5)
    assert terms.metrics["lm_loss"].item() == pytest.approx(lm.item(), rel=1e-5)
    assert terms.metrics["token_accuracy"].item() == right
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.norm() > 0:
            error = (actual[name] - p.grad).norm() / p.grad.norm()
            assert error < 1e-4, name


def test_a_solution_alone_costs_what_it_costs_beside_others(
    make_verifier: Verifiers, solutions: TokenStore
) -> None:
    model, objective = make_verifier(), VerifierObjective(0.5)
    with torch.no_grad():
        together = objective(model, collate_answers(solutions, range(4))).loss_sum
        apart = [objective(model, collate_answers(solutions, [i])).loss_sum for i in range(4)]
    assert together.item() == pytest.approx(sum(loss.item() for loss in apart), rel=1e-5)


# --- scores


@pytest.fixture(scope="module")
def tiny_verifier(tiny_run: Any) -> VerifierModel:
    checkpoint = read_checkpoint(tiny_run.run / "verifier" / "final")
    return load_verifier(checkpoint, torch.device("cpu"))


PAIRS = [
    ("Tom has 3 pens. He buys 4 more. How many pens?", "3 + 4 = 7.\n#### 7"),
    ("How many?", ""),
    ("Anna has 12 cups. She sells 5. How many cups does Anna have now?", "12 - 5 = 6.\n#### 6"),
    ("How many?", "#### 1, or 2, or 3, or 4, or 5, or 6, or 7, or 8, or 9"),
    ("Ben has 9 toys. How many toys does Ben have now?", "#### 9"),
]


def slow_score(model: VerifierModel, prompt: list[int], answer: list[int]) -> float:
    """The score at the last token of one unpadded row."""
    mask = [False] * len(prompt) + [True] * len(answer)
    with torch.no_grad():
        value_M, _ = model(torch.tensor([prompt + answer]), torch.tensor([mask]))
    return 1 / (1 + math.exp(-float(value_M[-1])))


def test_scores_are_those_at_the_last_real_token(
    tiny_verifier: VerifierModel, tokenizer: Tokenizer
) -> None:
    expected = [
        slow_score(tiny_verifier, prompt_ids(tokenizer, q), answer_ids(tokenizer, a))
        for q, a in PAIRS
    ]
    for size in (1, 2, 5):
        actual = score_solutions(tiny_verifier, tokenizer, PAIRS, batch_size=size, precision="fp32")
        assert actual == pytest.approx(expected, abs=1e-6)
    assert len({round(score, 9) for score in expected}) == len(PAIRS)
    assert all(0 < score < 1 for score in expected)


def test_scores_follow_their_solutions_in_any_order(
    tiny_verifier: VerifierModel, tokenizer: Tokenizer
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "precision": "fp32"}
    scores = score_solutions(tiny_verifier, tokenizer, PAIRS, **options)
    turned = score_solutions(tiny_verifier, tokenizer, PAIRS[::-1], **options)
    assert turned[::-1] == pytest.approx(scores, abs=1e-6)


def test_a_question_too_long_is_cut_from_its_start(
    tiny_verifier: VerifierModel, tokenizer: Tokenizer
) -> None:
    limit = tiny_verifier.config.max_seq_len
    question = "Tom has 3 pens. " * 80 + "How many pens?"
    answer = answer_ids(tokenizer, "#### 3")
    ids = prompt_ids(tokenizer, question)
    kept = [*ids[:2], *ids[-(limit - len(answer) - 2) :]]
    assert len(kept) + len(answer) == limit
    (score,) = score_solutions(
        tiny_verifier, tokenizer, [(question, "#### 3")], batch_size=1, precision="fp32"
    )
    assert score == pytest.approx(slow_score(tiny_verifier, kept, answer), abs=1e-6)


def test_a_policy_is_no_verifier(tiny_run: Any) -> None:
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_verifier(read_checkpoint(tiny_run.run / "dpo" / "final"), torch.device("cpu"))


# --- what it is trained on


def config(**changes: Any) -> VerifierConfig:
    training = {"max_steps": 1, "batch_size": 2, "seq_len": 32}
    return VerifierConfig.model_validate({"data": ["synthetic"], "training": training, **changes})


WORKED = {
    f"Tom has {n} pens. He buys 2 more. How many?": f"{n} + 2 = {n + 2}.\n#### {n + 2}"
    for n in range(3, 9)
}


def samples(right: int, wrong: int) -> list[dict[str, Any]]:
    question = next(iter(WORKED))
    rows = [(1, "#### 5")] * right + [(0, "#### 4")] * wrong
    return [
        {"question": question, "text": text, "label": label, "origin": "sample"}
        for label, text in rows
    ]


@pytest.mark.parametrize(("min_right", "min_wrong"), [(0.2, 0.2), (0.5, 0.5), (0.4, 0.1), (0, 0.3)])
@pytest.mark.parametrize(("right", "wrong"), [(0, 40), (40, 0), (3, 37), (20, 20), (1, 1)])
def test_both_classes_reach_their_least_share(
    right: int, wrong: int, min_right: float, min_wrong: float
) -> None:
    own = samples(right, wrong)
    done = top_up(own, WORKED, config=config(min_right=min_right, min_wrong=min_wrong), seed=0)
    assert done[: len(own)] == own
    share = sum(s["label"] for s in done) / len(done)
    assert share >= min_right - 1e-9 or share == 1.0
    assert 1 - share >= min_wrong - 1e-9
    enough = right / len(own) >= min_right and wrong / len(own) >= min_wrong
    assert (len(done) == len(own)) == enough  # nothing is added where nothing is missing


def test_added_solutions_carry_the_right_label_and_origin() -> None:
    added = top_up(samples(0, 30), WORKED, config=config(min_right=0.5, min_wrong=0.5), seed=0)[30:]
    added += top_up(samples(30, 0), WORKED, config=config(min_right=0.5, min_wrong=0.5), seed=0)[
        30:
    ]
    assert len(added) == 60
    for solution in added:
        truth = gold_answer(WORKED[solution["question"]])
        answer = extract_answer(solution["text"])
        assert isinstance(answer, Decimal)
        assert (answer == truth) == (solution["label"] == 1)
        origin = "worked solution" if solution["label"] else "corrupted solution"
        assert solution["origin"] == origin
    assert {s["question"] for s in added} == set(WORKED)  # spread over all problems


def test_corruptions_are_a_function_of_the_seed() -> None:
    def texts(seed: int) -> list[str]:
        done = top_up(samples(30, 0), WORKED, config=config(min_wrong=0.5), seed=seed)
        return [s["text"] for s in done[30:]]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def stage(tiny: PipelineConfig, tiny_run: Any, folder: Path, **changes: Any) -> VerifierStage:
    section = config(**{**tiny.verifier.model_dump(mode="json"), **changes})
    return VerifierStage(
        tiny.model_copy(update={"verifier": section}), folder, tiny_run.run / "dpo" / "final"
    )


def read_solutions(folder: Path, split: str) -> list[dict[str, Any]]:
    lines = (folder / f"samples-{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_no_held_out_question_is_trained_on(tiny: PipelineConfig, tiny_run: Any) -> None:
    folder = tiny_run.run / "verifier"
    trained = {s["question"] for s in read_solutions(folder, "train")}
    held_out = {s["question"] for s in read_solutions(folder, "validation")}
    task = tiny.eval.reasoning
    assert task is not None
    tested = {row["question"] for row in open_source(task.source, tiny.data).rows(task.split)}
    assert trained and held_out and tested
    assert not trained & held_out
    assert not trained & tested
    assert not held_out & tested
    assert all(s["origin"] == "sample" for s in read_solutions(folder, "validation"))


def test_questions_in_both_splits_are_held_out(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)]
    for name, part in (("train", rows), ("valid", rows[:4])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    source = {
        "name": "jsonl", "kind": "problems", "path": str(tmp_path / "train.jsonl"),
        "validation_path": str(tmp_path / "valid.jsonl"),
    }  # fmt: skip
    made = stage(tiny, tiny_run, tmp_path, data=[source], n_problems=12)
    assert len(made.store) and len(made.validation_store)
    trained = {s["question"] for s in read_solutions(made.folder, "train")}
    held_out = {s["question"] for s in read_solutions(made.folder, "validation")}
    assert held_out == {row["question"] for row in rows[:4]}
    assert trained and not trained & held_out


def test_samples_are_drawn_once(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage(tiny, tiny_run, tmp_path)
    fingerprint = first.store.fingerprint

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(module, "sample_texts", refuse)
    assert stage(tiny, tiny_run, tmp_path).store.fingerprint == fingerprint


def test_labels_are_the_grades_of_the_texts(tiny_run: Any) -> None:
    for split in ("train", "validation"):
        for solution in read_solutions(tiny_run.run / "verifier", split):
            assert solution["label"] in (0, 1)
            if solution["label"] == 0 and solution["origin"] != "sample":
                assert "####" in solution["text"]


def test_one_class_alone_is_refused(tiny: PipelineConfig, tiny_run: Any, tmp_path: Path) -> None:
    made = stage(tiny, tiny_run, tmp_path, min_right=0.0, min_wrong=0.0)
    with pytest.raises(DataError, match="same label; nothing to learn"):
        made.execute()
    assert not (made.folder / "checkpoints").exists()


def test_the_verifier_starts_as_the_policy_with_a_seeded_head(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    made = stage(tiny, tiny_run, tmp_path)
    model, again = made.build_model(), made.build_model()
    weights = model.trunk.weights()
    for name, tensor in made.policy.weights().items():
        assert torch.equal(weights[name], tensor), name
    assert torch.equal(model.value_head.weight, again.value_head.weight)
    assert model.training


def test_the_base_rate_has_an_interval_over_problems(tiny_run: Any) -> None:
    folder = tiny_run.run / "verifier"
    labels: dict[str, list[int]] = {}
    for line in (folder / "samples-validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        labels.setdefault(row["question"], []).append(row["label"])
    assert {len(own) for own in labels.values()} == {2}
    scores = json.loads((folder / "result.json").read_text())["scores"]
    (base,) = (score for score in scores if score["metric"] == "base_rate")
    shares = [sum(own) / 2 for own in labels.values()]
    assert base["value"] == pytest.approx(sum(shares) / len(shares))
    assert base["ci95"] == pytest.approx(share_interval(shares))

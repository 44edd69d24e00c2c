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
from modern_llm.config import ModelConfig, PipelineConfig, SourceConfig, VerifierConfig
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
    assert objective.units(batch) == objective.scored(batch) == n_tokens
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


def test_the_balance_loss_of_experts_is_no_part_of_the_loss(
    make_verifier: Verifiers, solutions: TokenStore
) -> None:
    moe = {"n_experts": 4, "top_k": 2}
    batch, losses = collate_answers(solutions, range(4)), []
    for coef in (0.0, 0.5):
        model = make_verifier(moe={**moe, "balance_coef": coef})
        terms = VerifierObjective(0.5)(model, batch)
        losses.append(float(terms.loss_sum.detach()))
    assert losses[0] == losses[1]
    assert terms.aux_sum is not None
    aux = float(model.aux_loss().detach())
    assert float(terms.aux_sum.detach()) == pytest.approx(VerifierObjective(0.5).units(batch) * aux)
    terms.aux_sum.backward()
    assert model.trunk.blocks[0].moe.router.weight.grad.any()


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


def test_a_solution_without_room_scores_nothing_and_moves_no_other(
    tiny_verifier: VerifierModel, tokenizer: Tokenizer
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "precision": "fp32"}
    long = ("How many?", "1 + 1 = 2. " * 60 + "#### 2")
    scores = score_solutions(tiny_verifier, tokenizer, [PAIRS[0], long, PAIRS[2]], **options)
    alone = score_solutions(tiny_verifier, tokenizer, [PAIRS[0], PAIRS[2]], **options)
    assert scores == pytest.approx([alone[0], 0.0, alone[1]], abs=1e-6)


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


def test_what_a_question_is_about_says_nothing_of_the_label() -> None:
    worked = {
        f"{who} has {n} pens. {who} buys 2 more. How many?": f"{n} + 2 = {n + 2}.\n#### {n + 2}"
        for who in ("Anna", "Zoe")
        for n in range(3, 43)
    }
    for label in (0, 1):
        own = samples(*((30, 0) if label == 0 else (0, 30)))
        added = top_up(own, worked, config=config(min_right=0.4, min_wrong=0.4), seed=0)[30:]
        questions = {s["question"] for s in added}
        assert 20 <= len(added) == len(questions) < len(worked) / 2  # none comes twice
        assert 4 <= sum("Anna" in question for question in questions) <= 16


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


def problems_file(path: Path, numbers: range, *, what: str = "pens") -> str:
    rows = [
        {"question": f"{n} {what} and 1?", "answer": f"{n} + 1 = {n + 1}.\n#### {n + 1}"}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def jsonl(train: str, validation: str, **more: Any) -> dict[str, Any]:
    return {
        "name": "jsonl", "kind": "problems", "path": train, "validation_path": validation, **more
    }  # fmt: skip


def answering(*texts: str) -> Callable[..., list[list[str]]]:
    """A policy that gives the same answers to every question."""

    def sample(model: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[list[str]]:
        return [list(texts) for _ in prompts]

    return sample


def test_problems_that_are_tested_on_are_not_trained_on(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    train = problems_file(tmp_path / "train.jsonl", range(20))
    valid = problems_file(tmp_path / "valid.jsonl", range(100, 110))
    test = problems_file(tmp_path / "test.jsonl", range(5, 12))
    source = jsonl(train, valid, test_path=test)
    task = tiny.eval.reasoning
    assert task is not None
    # Another source than the verifier's own, and more problems than one evaluation asks for.
    tested = task.model_copy(update={"source": SourceConfig.model_validate(source)})
    tasks = tiny.eval.model_copy(update={"reasoning": tested})
    own = jsonl(train, valid)
    made = stage(tiny.model_copy(update={"eval": tasks}), tiny_run, tmp_path, data=[own])
    wanted = made.section.n_problems
    assert wanted == 6 > 5
    made.audit()
    trained = {s["question"] for s in read_solutions(made.folder, "train")}
    assert trained <= {f"{n} pens and 1?" for n in (*range(5), *range(12, 20))}
    assert len({s["question"] for s in read_solutions(made.folder, "train")}) == wanted
    dropped = made.data_records()[0]["dropped"]
    assert dropped["problem is in another split"] == 7


def test_every_source_has_its_part(tiny: PipelineConfig, tiny_run: Any, tmp_path: Path) -> None:
    valid = problems_file(tmp_path / "valid.jsonl", range(100, 110))
    sources = [
        jsonl(problems_file(tmp_path / f"{what}.jsonl", range(50), what=what), valid)
        for what in ("pens", "cups")
    ]
    made = stage(tiny, tiny_run, tmp_path, data=sources, n_problems=8)
    made.audit()
    trained = {s["question"] for s in read_solutions(made.folder, "train")}
    assert sum("pens" in q for q in trained) == sum("cups" in q for q in trained) == 4


def test_labels_and_base_rate_are_those_of_the_policy(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = problems_file(tmp_path / "train.jsonl", range(1, 7))
    valid = problems_file(tmp_path / "valid.jsonl", range(100, 104))
    # One of six training problems and one of four held-out ones is answered rightly.
    monkeypatch.setattr(module, "sample_texts", answering("#### 4", "#### 102", "no number"))
    made = stage(tiny, tiny_run, tmp_path, data=[jsonl(train, valid)], min_right=0.4, min_wrong=0.2)
    facts = made.audit()
    for split, right in (("train", "3 pens and 1?"), ("validation", "101 pens and 1?")):
        own = [s for s in read_solutions(made.folder, split) if s["origin"] == "sample"]
        answers = {"#### 4"} if split == "train" else {"#### 102"}
        assert len(own) == (18 if split == "train" else 12)
        assert all(
            (s["label"] == 1) == (s["question"] == right and s["text"] in answers) for s in own
        )
        assert sum(s["label"] for s in own) == 1
    everything = read_solutions(made.folder, "train")
    assert facts["samples"] == 18 < facts["solutions"] == len(everything)
    assert facts["base_rate"] == pytest.approx(1 / 18)
    assert facts["right_share"] == pytest.approx(
        sum(s["label"] for s in everything) / len(everything)
    )
    assert 0.4 <= facts["right_share"] < 0.5
    [base] = [s for s in made.scores(made.build_model().eval()) if s.metric == "base_rate"]
    assert (base.value, base.n) == (pytest.approx(1 / 12), 12)


def test_loss_and_scores_are_over_the_same_solutions(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "1 + 1 = 2. " * 30 + "#### 4"
    monkeypatch.setattr(module, "sample_texts", answering("#### 4", "#### 5", long))
    rows = [{"question": f"{'pens ' * 60} {n}?", "answer": "3 + 1 = 4.\n#### 4"} for n in range(8)]
    for name, part in (("train", rows[:5]), ("valid", rows[5:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    source = jsonl(str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl"))
    training = {**tiny.verifier.training.model_dump(mode="json"), "seq_len": 48}
    made = stage(
        tiny, tiny_run, tmp_path, data=[source], training=training, min_right=0.4,
        min_wrong=0.4,
    )  # fmt: skip
    made.audit()
    for split, store in (("train", made.store), ("validation", made.validation_store)):
        solutions = read_solutions(made.folder, split)
        assert len(store) == len(solutions) >= 6  # long questions are cut, not left out
        assert store.columns["label"].tolist() == [s["label"] for s in solutions]
        assert long not in {s["text"] for s in solutions}
    right = [s["label"] for s in read_solutions(made.folder, "train")]
    assert sum(right) / len(right) == 0.5
    assert [r["dropped"] for r in made.data_records()] == [{"too long": 5}, {"too long": 3}]

    seen: list[float] = []

    def noted(*arguments: Any, **options: Any) -> list[float]:
        seen.extend(score_solutions(*arguments, **options))
        return list(seen)

    monkeypatch.setattr(module, "score_solutions", noted)
    model = made.build_model().eval()
    made.scores(model)
    rows_of = map(made.validation_store.record, range(len(made.validation_store)))
    expected = [slow_score(model, prompt.tolist(), answer.tolist()) for prompt, answer in rows_of]
    assert seen == pytest.approx(expected, abs=1e-6)


def test_a_corruption_that_outgrew_its_row_is_dropped_before_anything_is_told(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = problems_file(tmp_path / "train.jsonl", range(8, 9))
    valid = problems_file(tmp_path / "valid.jsonl", range(100, 104))
    monkeypatch.setattr(module, "sample_texts", answering(*["#### 9"] * 40))
    tokenizer = stage(tiny, tiny_run, tmp_path).tokenizer
    fits = 3 + len(answer_ids(tokenizer, "8 + 1 = 9.\n#### 9"))
    training = {**tiny.verifier.training.model_dump(mode="json"), "seq_len": fits}
    made = stage(
        tiny, tiny_run, tmp_path, data=[jsonl(train, valid)], training=training, min_wrong=0.5
    )
    facts = made.audit()
    solutions = read_solutions(made.folder, "train")
    assert 40 < len(solutions) == len(made.store) == facts["solutions"] < 80
    assert made.data_records()[0]["dropped"]["too long"] == 80 - len(solutions)


def test_problems_that_changed_are_refused_unless_allowed(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    train = problems_file(tmp_path / "train.jsonl", range(20))
    valid = problems_file(tmp_path / "valid.jsonl", range(100, 110))
    first = stage(tiny, tiny_run, tmp_path, data=[jsonl(train, valid)])
    first.audit()
    before = read_solutions(first.folder, "validation")
    problems_file(tmp_path / "valid.jsonl", range(200, 210))
    again = stage(tiny, tiny_run, tmp_path, data=[jsonl(train, valid)])
    with pytest.raises(DataError, match=r"problems changed since .*samples-train"):
        again.audit()
    allowed = VerifierStage(
        again.config, tmp_path, tiny_run.run / "dpo" / "final", allow_data_change=True
    )
    allowed.audit()
    assert read_solutions(first.folder, "validation") == before
    found = {s.metric: s for s in allowed.scores(allowed.build_model().eval()) if hasattr(s, "n")}
    assert found["base_rate"].n == len(before)


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

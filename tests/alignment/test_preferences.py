import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modern_llm.alignment.preferences import DPOObjective, dpo_loss, ipo_loss, pair_logprobs
from modern_llm.alignment.sampling import sample_ids
from modern_llm.alignment.stages import dpo
from modern_llm.alignment.stages.dpo import DPOStage
from modern_llm.config import DPOConfig, PipelineConfig, TrainingConfig
from modern_llm.data.collate import PairBatch, collate_pairs
from modern_llm.data.loader import BucketLoader
from modern_llm.data.store import TokenStore
from modern_llm.errors import DivergedError
from modern_llm.models import ModernDecoderLM
from modern_llm.training.update import Update

Models = Callable[..., ModernDecoderLM]
Pairs = list[tuple[list[int], ...]]
LN2 = 0.6931471805599453
MARGINS = [-400.0, -3.0, -0.1, 0.0, 1e-3, 0.7, 5.0, 400.0]
KINDS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned positions": {"position": "learned", "norm": "layernorm", "ffn": "standard"},
    "no positions": {"position": "none"},
    "window": {"attention": "window", "window": 4},
    "window and sinks": {"attention": "window", "window": 4, "n_sinks": 2},
    "manual backend, learned sink": {"attention_backend": "manual", "sink": "learned"},
    "experts": {"moe": {"n_experts": 4, "top_k": 2}},
    "post-norm": {"norm_position": "post"},
}


def options(**changes: Any) -> DPOConfig:
    training = {"max_steps": 2, "batch_size": 8, "seq_len": 32, "device": "cpu"}
    return DPOConfig.model_validate({"data": ["synthetic"], "training": training, **changes})


def sequence_logprob(model: ModernDecoderLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """One answer by its own forward pass, without padding, summed in float64."""
    logits_TV = model(torch.tensor([prompt + answer]))[0].double()
    logprob_TV = logits_TV.log_softmax(-1)
    first = len(prompt) - 1
    return sum(logprob_TV[first + i, token] for i, token in enumerate(answer))  # type: ignore[return-value]


# --- losses against closed forms and a float64 reference


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_loss_matches_float64(beta: float, smoothing: float) -> None:
    actual = dpo_loss(torch.tensor(MARGINS), beta=beta, label_smoothing=smoothing)
    margin = np.array(MARGINS, dtype=np.float64)
    kept, flipped = np.logaddexp(0, -beta * margin), np.logaddexp(0, beta * margin)
    expected = (1 - smoothing) * kept + smoothing * flipped
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-6, atol=1e-7)


def test_dpo_loss_closed_forms() -> None:
    zero = torch.zeros(3)
    torch.testing.assert_close(dpo_loss(zero, beta=0.3), torch.full((3,), LN2))
    # A margin of ln 3 / beta: the chosen answer is right with odds 3 to 1.
    margin = torch.tensor([math.log(3) / 0.3])
    assert float(dpo_loss(margin, beta=0.3)) == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert float(dpo_loss(-margin, beta=0.3)) == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_slope_at_the_reference(smoothing: float) -> None:
    margin = torch.zeros(1, requires_grad=True)
    dpo_loss(margin, beta=0.4, label_smoothing=smoothing).sum().backward()
    assert margin.grad is not None
    assert float(margin.grad) == pytest.approx(-0.4 * (0.5 - smoothing), rel=1e-6)


def test_smoothed_loss_is_least_at_the_odds_of_a_kept_label() -> None:
    best = math.log(0.8 / 0.2) / 0.5
    at = torch.tensor([best - 0.1, best, best + 0.1], dtype=torch.float64)
    loss = dpo_loss(at, beta=0.5, label_smoothing=0.2)
    assert int(loss.argmin()) == 1


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_ipo_loss_matches_float64(beta: float) -> None:
    margin = np.array([-3.0, 0.0, 0.5 / beta, 4.0])
    actual = ipo_loss(torch.tensor(margin, dtype=torch.float32), beta=beta).numpy()
    np.testing.assert_allclose(actual, (margin - 0.5 / beta) ** 2, rtol=1e-6, atol=1e-9)
    assert actual[2] == 0


# --- log-probabilities of one row a pair


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_a_pair_equals_two_sequences(
    make_model: Models, pair_records: TokenStore, pairs: Pairs, kind: str
) -> None:
    model = make_model(**KINDS[kind])
    batch = collate_pairs(pair_records, range(8))
    assert batch.tokens_BT.shape[1] > max(sum(map(len, pair)) for pair in pairs) - 8  # padded rows
    with torch.no_grad():
        actual_B2 = pair_logprobs(model, batch)
        expected = [
            [sequence_logprob(model, prompt, answer) for answer in answers]
            for prompt, *answers in pairs
        ]
    assert actual_B2.dtype == torch.float32
    torch.testing.assert_close(actual_B2.double(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_their_neighbours(
    make_model: Models, pair_records: TokenStore
) -> None:
    model = make_model()
    together = pair_logprobs(model, collate_pairs(pair_records, range(8)))
    order = [5, 2, 7]
    apart = pair_logprobs(model, collate_pairs(pair_records, order))
    torch.testing.assert_close(apart, together[order], rtol=1e-6, atol=1e-5)


def test_the_rejected_answer_does_not_see_the_chosen_one(
    make_model: Models, make_store: Callable[..., TokenStore]
) -> None:
    segments = ("prompt", "chosen", "rejected")
    first = make_store([([5, 6, 7], [8, 9, 10], [11, 12])], segments)
    other = make_store([([5, 6, 7], [20, 21, 22], [11, 12])], segments)
    model = make_model()
    with torch.no_grad():
        rows = [pair_logprobs(model, collate_pairs(store, [0])) for store in (first, other)]
    assert float(rows[0][0, 0]) != pytest.approx(float(rows[1][0, 0]))
    torch.testing.assert_close(rows[0][:, 1], rows[1][:, 1], rtol=0, atol=0)


def test_long_pairs_fit_when_each_answer_alone_would(
    make_model: Models, make_store: Callable[..., TokenStore]
) -> None:
    prompt, chosen, rejected = [5] * 16, [6] * 16, [7] * 16  # 48 tokens, positions below 32
    store = make_store([(prompt, chosen, rejected)], ("prompt", "chosen", "rejected"))
    model = make_model(position="learned")
    with torch.no_grad():
        actual = pair_logprobs(model, collate_pairs(store, [0]))[0].double()
        expected = [sequence_logprob(model, prompt, answer) for answer in (chosen, rejected)]
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-5)


# --- the objective


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("kind", ["rope", "window and sinks"])
def test_loss_and_gradient_equal_those_of_separate_sequences(
    make_model: Models, pair_records: TokenStore, pairs: Pairs, kind: str, loss: str
) -> None:
    reference_P2 = torch.tensor([[-4.0, -9.0], [-20.0, -2.0]] * 4)
    objective = DPOObjective(options(loss=loss, beta=0.2), reference_P2)
    model = make_model(**KINDS[kind])
    terms = objective(model, collate_pairs(pair_records, range(8)))
    terms.loss_sum.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for (prompt, *answers), before in zip(pairs, reference_P2.tolist(), strict=True):
        ratio = [sequence_logprob(model, prompt, a) - b for a, b in zip(answers, before)]  # noqa: B905
        if loss == "ipo":
            margin = ratio[0] / len(answers[0]) - ratio[1] / len(answers[1])
            total = total + (margin - 1 / (2 * 0.2)) ** 2
        else:
            total = total + torch.log1p(torch.exp(-0.2 * (ratio[0] - ratio[1])))
    total.backward()

    assert terms.loss_sum.item() == pytest.approx(total.item(), rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-8)
        assert error < 1e-4, name


def test_metrics_are_sums_over_pairs(
    make_model: Models, pair_records: TokenStore, pairs: Pairs
) -> None:
    reference_P2 = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)) * 9 - 20
    model, rows = make_model(), [6, 1, 3]
    objective = DPOObjective(options(beta=0.2), reference_P2)
    with torch.no_grad():
        terms = objective(model, collate_pairs(pair_records, rows))
        reward = np.array(
            [
                [0.2 * float(sequence_logprob(model, pairs[i][0], pairs[i][side + 1])
                             - reference_P2[i, side]) for side in (0, 1)]
                for i in rows
            ]
        )  # fmt: skip
    margin = reward[:, 0] - reward[:, 1]
    expected = {
        "accuracy": (margin > 0).sum(), "margin": margin.sum(),
        "chosen_reward": reward[:, 0].sum(), "rejected_reward": reward[:, 1].sum(),
    }  # fmt: skip
    assert {k: float(v) for k, v in terms.metrics.items()} == pytest.approx(expected, rel=1e-4)
    batch = collate_pairs(pair_records, rows)
    assert objective.units(batch) == 3
    assert objective.scored(batch) == len(batch.targets().at_M)


def test_a_tie_counts_one_half(make_model: Models, pair_records: TokenStore) -> None:
    model, batch = make_model(), collate_pairs(pair_records, range(8))
    with torch.no_grad():
        before_P2 = pair_logprobs(model, batch)
        before_P2[:2, 0] -= 1.0  # two won, five tied, one lost
        before_P2[7, 0] += 1.0
        terms = DPOObjective(options(), before_P2)(model, batch)
    assert float(terms.metrics["accuracy"]) == 2 + 5 / 2


def test_the_balance_loss_of_experts_is_no_part_of_the_loss(
    make_model: Models, pair_records: TokenStore
) -> None:
    model = make_model(moe={"n_experts": 4, "top_k": 2, "balance_coef": 0.5})
    batch = collate_pairs(pair_records, range(8))
    with torch.no_grad():
        reference_P2 = pair_logprobs(model, batch)
    terms = DPOObjective(options(), reference_P2)(model, batch)
    assert float(terms.loss_sum.detach()) / 8 == pytest.approx(LN2, abs=1e-5)
    assert terms.aux_sum is not None
    assert float(terms.aux_sum.detach()) == pytest.approx(8 * float(model.aux_loss().detach()))
    terms.aux_sum.backward()
    assert model.blocks[0].moe.router.weight.grad.any()


def test_log_probabilities_are_float32_for_logits_in_bfloat16(pair_records: TokenStore) -> None:
    rng = torch.Generator().manual_seed(2)
    batch = collate_pairs(pair_records, range(8))
    logits_MV = (torch.randn(batch.tokens_BT.numel(), 24, generator=rng) * 3).bfloat16()

    class Head(torch.nn.Module):
        def forward(self, tokens_BT: torch.Tensor, *, at_M: torch.Tensor, **_: Any) -> torch.Tensor:
            return logits_MV[at_M]

    actual_B2 = pair_logprobs(Head(), batch)
    targets = batch.targets()
    expected = np.zeros((8, 2))
    logprob = logits_MV[targets.at_M].double().log_softmax(-1)
    for i, (row, side) in enumerate(zip(targets.row_M, targets.rejected_M.long(), strict=True)):
        expected[row, side] += float(logprob[i, targets.label_M[i]])
    assert actual_B2.dtype == torch.float32
    np.testing.assert_allclose(actual_B2.numpy(), expected, rtol=1e-5)


def test_loss_at_the_reference(make_model: Models, pair_records: TokenStore) -> None:
    model = make_model()
    with torch.no_grad():
        reference_P2 = pair_logprobs(model, collate_pairs(pair_records, range(8)))
        for changes in ({}, {"label_smoothing": 0.2}, {"loss": "ipo", "beta": 0.3}):
            objective = DPOObjective(options(**changes), reference_P2)
            loss = float(objective(model, collate_pairs(pair_records, [3, 0, 4])).loss_sum) / 3
            assert loss == pytest.approx(objective.at_reference(), abs=1e-5)
            if changes.get("loss") != "ipo":
                assert loss == pytest.approx(LN2, abs=1e-5)


def gradients(
    model: ModernDecoderLM, store: TokenStore, micro_batch_size: int
) -> tuple[dict[str, torch.Tensor], float]:
    """What reaches the optimizer in the second step of the bucket loader's epoch."""
    config = TrainingConfig(
        max_steps=4, batch_size=8, micro_batch_size=micro_batch_size, seq_len=32, device="cpu",
        max_grad_norm=1e9,
    )  # fmt: skip
    loader: BucketLoader[PairBatch] = BucketLoader(
        store, batch_size=8, micro_batch_size=micro_batch_size, seed=5, collate=collate_pairs
    )
    reference_P2 = torch.full((len(store), 2), -20.0)
    update = Update(
        model, DPOObjective(options(), reference_P2), config, device=torch.device("cpu")
    )
    seen: dict[str, torch.Tensor] = {}
    for part in update.optimizers.parts:
        part.register_step_pre_hook(
            lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        )
    stats = update(loader.batches(1), step=0)
    return seen, stats.loss


def test_eight_pairs_at_once_equal_one_by_one(
    make_model: Models, make_store: Callable[..., TokenStore], pairs: Pairs
) -> None:
    many = [(p, [*c, i], r) for i, (p, c, r) in enumerate(pairs * 2, start=5)]
    store = make_store(many, ("prompt", "chosen", "rejected"))
    whole, whole_loss = gradients(make_model(), store, 8)
    for size in (1, 2):
        parts, loss = gradients(make_model(), store, size)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        for name, expected in whole.items():
            error = (parts[name] - expected).norm() / expected.norm()
            assert error < 1e-5, name


# --- the stage


def test_first_loss_of_the_stage_is_ln_2_on_every_batch(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    stage = DPOStage(tiny, tmp_path, tiny_run.run / "sft" / "final")
    model, objective = stage.build_model(), stage.objective()
    assert not model.training  # no dropout, as in the reference
    loader, seen = stage.loader(), 0
    with torch.no_grad():
        for step in range(loader.steps_per_epoch):
            for batch in loader.batches(step):
                loss = float(objective(model, batch).loss_sum) / objective.units(batch)
                assert loss == pytest.approx(LN2, abs=1e-5)
                seen += objective.units(batch)
    assert seen >= len(stage.store) > 4


def test_policy_and_reference_are_the_same_model_with_dropout(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    model = tiny.model.model_copy(update={"dropout": 0.5})
    stage = DPOStage(
        tiny.model_copy(update={"model": model}), tmp_path, tiny_run.run / "sft" / "final"
    )
    batch = stage.loader().batches(0)[0]
    with torch.no_grad():
        loss = float(stage.objective()(stage.build_model(), batch).loss_sum) / len(batch.index_B)
    assert loss == pytest.approx(LN2, abs=1e-5)


def test_kl_is_that_of_the_policy_from_the_reference(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DPOStage(tiny, tmp_path, tiny_run.run / "sft" / "final")
    reference, policy = stage.build_model(), stage.build_model()
    assert stage.kl(policy).value == pytest.approx(0.0, abs=1e-4)
    with torch.no_grad():
        policy.embedding.weight.mul_(10.0)
    drawn: list[tuple[list[int], list[int]]] = []

    def noted(model: Any, tokenizer: Any, prompts: Any, **chosen: Any) -> list[list[int]]:
        answers = sample_ids(model, tokenizer, prompts, **chosen)
        drawn.extend(zip(prompts, answers, strict=True))
        return answers

    monkeypatch.setattr(dpo, "sample_ids", noted)
    score = stage.kl(policy)
    longest, end = tiny.dpo.max_answer_tokens, stage.tokenizer.eos_id
    rows = [(p, a if len(a) == longest else [*a, end]) for p, a in drawn]
    with torch.no_grad():
        ratios = [
            float(sequence_logprob(policy, *row) - sequence_logprob(reference, *row))
            for row in rows
        ]
    assert score.n == len(rows) == len(stage.validation_store)
    assert score.value == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert score.value > 0.1  # a policy is likelier under itself


def test_a_policy_that_is_not_the_reference_is_refused(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path
) -> None:
    stage = DPOStage(tiny, tmp_path, tiny_run.run / "sft" / "final")
    expected = stage.first_loss()
    expected.check(LN2)
    with pytest.raises(DivergedError, match="the policy is the reference"):
        expected.check(LN2 + 0.01)

import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM, VerifierModel
from modern_llm.models.verifier import least_so_far


def make(**changes: object) -> VerifierModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
    return VerifierModel(ModelConfig(**{**sizes, "init_std": 0.3, **changes})).eval()


ROWS = [([1, 2, 3], [4, 5, 6, 7]), ([8], [9]), ([10, 11, 12], [13]), ([14], [15, 14, 16])]


def padded(
    rows: list[tuple[list[int], list[int]]], width: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the mask of the solutions, padded on the right."""
    tokens = [q + a + [pad_id] * (width - len(q + a)) for q, a in rows]
    answer = [[len(q) <= t < len(q + a) for t in range(width)] for q, a in rows]
    return torch.tensor(tokens), torch.tensor(answer)


def slow_values(model: VerifierModel, question: list[int], answer: list[int]) -> list[float]:
    """The score's logit after each token of one solution, from its definition."""
    row = torch.tensor([question + answer])
    hidden_TD = model.trunk.hidden(row)[0].double()
    logprob_TV = model.trunk(row)[0].double().log_softmax(-1)
    weight_D, bias = model.value_head.weight[0].double(), model.value_head.bias.item()
    values, least = [], float("inf")
    for i, token in enumerate(answer):
        at = len(question) + i
        least = min(least, logprob_TV[at - 1, token].item())
        values.append((hidden_TD[at] @ weight_D).item() + bias + least)
    return values


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_values_and_log_probabilities_from_their_definition(position: str) -> None:
    model = make(position=position)
    tokens_BT, answer_BT = padded(ROWS, 9, 0)
    value_M, logprob_M = model(tokens_BT, answer_BT)
    expected = [value for row in ROWS for value in slow_values(model, *row)]
    assert value_M.dtype is logprob_M.dtype is torch.float32
    assert value_M.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    policy = ModernDecoderLM(model.config).eval()
    policy.load_weights(model.trunk.weights())
    rows = [policy(torch.tensor([q + a]))[0].log_softmax(-1) for q, a in ROWS]
    likely = [
        row[len(q) + i - 1, token].item()
        for row, (q, a) in zip(rows, ROWS, strict=True)
        for i, token in enumerate(a)
    ]
    assert logprob_M.tolist() == pytest.approx(likely, rel=1e-4, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("pad_id", [0, 22])
def test_a_score_depends_on_its_row_only(position: str, pad_id: int) -> None:
    """Not on batch, padding width, padding id or neighbours, also where the id is in the text."""
    model = make(position=position)
    rows = [*ROWS, ([1, pad_id], [2, pad_id])]
    alone = torch.cat([model.score(*padded([row], len(row[0] + row[1]), 1)) for row in rows])
    expected = [slow_values(model, *row)[-1] for row in rows]
    assert alone.logit().tolist() == pytest.approx(expected, abs=1e-3)
    for width in (7, 11):
        scores = model.score(*padded(rows, width, pad_id))
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
        turned = model.score(*padded(rows[::-1], width, pad_id))
        torch.testing.assert_close(turned.flip(0), alone, rtol=1e-4, atol=1e-5)
    assert ((alone > 0) & (alone < 1)).all()
    assert alone.std() > 1e-3


def test_the_least_likely_token_so_far() -> None:
    answer_BT = torch.tensor([[False, True, True, True, False], [False, False, True, True, True]])
    logprob_M = torch.tensor([-0.5, -2.0, -1.0, -3.0, -0.1, -4.0], requires_grad=True)
    least_M = least_so_far(logprob_M, answer_BT)
    assert least_M.tolist() == [-0.5, -2.0, -2.0, -3.0, -3.0, -4.0]
    least_M.sum().backward()
    assert logprob_M.grad is not None
    assert logprob_M.grad.tolist() == [1.0, 2.0, 0.0, 2.0, 0.0, 1.0]


@torch.no_grad()
def test_a_slip_lowers_the_score_of_an_untrained_head() -> None:
    """A trunk that is sure of what follows marks down a solution that says something else."""
    model = make(init_std=0.02)
    model.trunk.embedding.weight[5] *= 50  # the next token is 5, whatever came before
    likely, slip = ([1, 2], [5, 5, 5]), ([1, 2], [5, 6, 5])
    score_likely, score_slip = model.score(*padded([likely, slip], 5, 0)).tolist()
    assert score_slip < score_likely


def test_joint_gradient_reaches_head_and_trunk() -> None:
    model = make(moe={"n_experts": 4}).train()
    model.set_activation_checkpointing(True)
    value_M, logprob_M = model(*padded(ROWS, 7, 0))
    (logprob_M.sum() + value_M.square().sum() + model.aux_loss()).backward()
    assert model.value_head.weight.grad.any()
    assert model.trunk.blocks[0].attention.qkv.weight.grad.any()
    assert set(model.moe_load()) == {"layer.0", "layer.1"}
    assert model.cost(16).params == sum(p.numel() for p in model.parameters())

import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM, VerifierModel


def make(**changes: object) -> VerifierModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
    return VerifierModel(ModelConfig(**{**sizes, "init_std": 0.3, **changes})).eval()


ROWS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("pad_id", [0, 22])
def test_a_score_depends_on_its_row_only(position: str, pad_id: int) -> None:
    """Not on batch, padding side, padding width, padding id or neighbours."""
    model = make(position=position)
    lengths = torch.tensor([len(row) for row in ROWS])
    alone = torch.cat([model.score(torch.tensor([row]), torch.tensor([len(row)])) for row in ROWS])
    for width in (7, 11):
        right = torch.tensor([row + [pad_id] * (width - len(row)) for row in ROWS])
        left = torch.tensor([[pad_id] * (width - len(row)) + row for row in ROWS])
        torch.testing.assert_close(model.score(right, lengths), alone, rtol=1e-4, atol=1e-5)
        scores = model.score(left, lengths, padding="left")
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
        turned = model.score(right.flip(0), lengths.flip(0)).flip(0)
        torch.testing.assert_close(turned, alone, rtol=1e-4, atol=1e-5)
    assert ((alone > 0) & (alone < 1)).all()
    assert alone.std() > 1e-3


def test_score_is_the_value_at_the_last_real_token() -> None:
    """Also when the pad id occurs in the text."""
    model = make()
    tokens = torch.tensor([[1, 0, 2, 0, 0, 0]])
    logits, value_BT = model(tokens)
    assert logits.shape == (1, 6, 23)
    assert value_BT.dtype is torch.float32
    score = model.score(tokens, torch.tensor([4]))
    torch.testing.assert_close(score[0], value_BT[0, 3].sigmoid())


def test_language_model_of_the_trunk() -> None:
    policy = ModernDecoderLM(make().config).eval()
    model = make()
    model.trunk.load_weights(policy.weights())
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(tokens)[0], policy(tokens))
    torch.testing.assert_close(model(tokens, at_M=torch.tensor([2]))[0], policy(tokens)[0, 2:])
    assert model(tokens, at_M=torch.tensor([2]))[1].shape == (1, 3)


def test_an_untrained_score_is_near_one_half() -> None:
    scores = make(init_std=0.02).score(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    assert scores.item() == pytest.approx(0.5, abs=0.1)


def test_joint_gradient_reaches_head_and_trunk() -> None:
    model = make(moe={"n_experts": 4}).train()
    model.set_activation_checkpointing(True)
    logits, value_BT = model(torch.tensor([[1, 2, 3, 4]]))
    (logits.float().logsumexp(-1).sum() + value_BT.square().sum() + model.aux_loss()).backward()
    assert model.value_head.weight.grad.any()
    assert model.trunk.blocks[0].attention.qkv.weight.grad.any()
    assert set(model.moe_load()) == {"layer.0", "layer.1"}
    assert model.cost(16).params == sum(p.numel() for p in model.parameters())

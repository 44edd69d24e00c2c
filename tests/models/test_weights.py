import copy

import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.errors import CheckpointError
from modern_llm.models import ModernDecoderLM, VerifierModel


def make(**changes: object) -> ModernDecoderLM:
    sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, max_seq_len=16)
    return ModernDecoderLM(ModelConfig(**{**sizes, **changes}))


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied: bool) -> None:
    a, b = make(tie_embeddings=tied), make(tie_embeddings=tied)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(a(tokens), b(tokens))
    b.load_weights({name: x.clone() for name, x in a.weights().items()})
    assert torch.equal(a(tokens), b(tokens))
    assert ("head.weight" in a.weights()) is not tied


def test_no_two_weights_share_memory() -> None:
    for model in (make(), VerifierModel(make().config)):
        pointers = [x.data_ptr() for x in model.weights().values()]
        assert len(pointers) == len(set(pointers))
        total = sum(x.numel() for x in model.weights().values())
        assert total == sum(p.numel() for p in model.parameters())


def test_tied_gradient_has_both_parts() -> None:
    model = make()
    tokens = torch.tensor([[1, 2, 3]])
    model(tokens).logsumexp(-1).sum().backward()
    both = model.embedding.weight.grad.clone()
    head = make(tie_embeddings=False)
    head.load_weights({**model.weights(), "head.weight": model.embedding.weight.detach()})
    head(tokens).logsumexp(-1).sum().backward()
    torch.testing.assert_close(both, head.embedding.weight.grad + head.head.weight.grad)


def test_compiled_names_are_plain() -> None:
    model = make()
    wrapped = torch.compile(copy.deepcopy(model), backend="eager")
    names = [f"_orig_mod.{name}" for name in model.weights()]
    assert sorted(wrapped.state_dict()) == sorted(names)
    model.load_weights(dict(wrapped.state_dict()))


def test_differences_are_told_and_nothing_is_loaded() -> None:
    model = make()
    before = {name: x.clone() for name, x in model.weights().items()}
    other = make(vocab_size=29, tie_embeddings=False, qk_norm=True)
    with pytest.raises(CheckpointError) as error:
        model.load_weights(other.weights())
    message = str(error.value)
    assert "'embedding.weight' is (29, 32) torch.float32, the model has (23, 32)" in message
    assert "'head.weight' has no place" in message
    weights = model.weights()
    del weights["blocks.1.ffn.down.weight"]
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.ffn\.down\.weight' is missing"):
        model.load_weights(weights)
    with pytest.raises(CheckpointError, match="and 6 more"):
        model.load_weights({})
    assert all(torch.equal(x, before[name]) for name, x in model.weights().items())

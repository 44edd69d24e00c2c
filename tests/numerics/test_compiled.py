"""torch.compile without graph breaks gives the eager values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM

SIZES = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
VARIANTS = [
    {},
    {"norm": "layernorm", "position": "learned", "ffn": "standard", "bias": True},
    {"moe": {"n_experts": 4, "top_k": 2}, "qk_norm": True, "norm_position": "post"},
    {"attention": "window", "window": 4, "n_sinks": 1, "sink": "learned"},
    {"attention_backend": "manual", "tie_embeddings": False},
]


def step(model: ModernDecoderLM, doc_ids: torch.Tensor | None) -> list[torch.Tensor]:
    tokens = torch.randint(0, 23, (3, 16), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, doc_ids_BT=doc_ids).float()
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    (loss + (model.aux_loss() or 0.0)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *grads]


@pytest.mark.parametrize(("whole", "checkpointing"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_traces_without_breaks(variant: dict, whole: bool, checkpointing: bool) -> None:
    """One graph, forward and backward, for every kind of part; not handed to a code generator."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ModernDecoderLM(ModelConfig(**SIZES, **variant))
    model.set_activation_checkpointing(checkpointing)
    docs = torch.tensor([[0] * 6 + [1] * 10] * 3)
    eager = [step(model, None), step(model, docs)]
    if whole:
        nn.Module.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.compile(fullgraph=True, backend="aot_eager")
    for expected, ids in zip(eager, (None, docs), strict=True):
        for a, b in zip(step(model, ids), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all("_orig_mod" not in name for name in model.state_dict())


def test_equal_blocks_are_compiled_once() -> None:
    torch._dynamo.reset()
    model = ModernDecoderLM(ModelConfig(**{**SIZES, "n_layers": 10}))
    counter = CompileCounterWithBackend("eager")
    model.compile(fullgraph=True, backend=counter)
    step(model, None)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_to_machine_code() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ModernDecoderLM(ModelConfig(**SIZES))
    expected = step(model, None)
    model.compile(fullgraph=True)
    for a, b in zip(step(model, None), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

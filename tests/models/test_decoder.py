import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models import ACTIVATIONS, FFNS, NORMS, POSITIONS, ModernDecoderLM

SIZES = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
VARIANTS = [
    *({"norm": name, "norm_position": at} for name in NORMS for at in ("pre", "post")),
    *({"position": name} for name in POSITIONS),
    *({"ffn": name} for name in FFNS),
    *({"ffn": "standard", "activation": name} for name in ACTIVATIONS),
    {"moe": {"n_experts": 4, "top_k": 2}},
    {"moe": {"n_experts": 3, "top_k": 1, "every": 2}, "ffn": "standard", "bias": True},
    {"qk_norm": True, "bias": True, "tie_embeddings": False},
    {"sink": "learned"},
    {"attention": "window", "window": 3, "n_sinks": 2},
    {"attention": "window", "window": 3, "window_pattern": "SL"},
    {"attention": "linear"},
    {"n_kv_heads": 4},
]


def make(**changes: object) -> ModernDecoderLM:
    torch.manual_seed(0)
    return ModernDecoderLM(ModelConfig(**{**SIZES, **changes}))


def tokens(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(0, 23, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_first_loss_is_ln_v_and_every_parameter_learns(variant: dict) -> None:
    model = make(**variant)
    logits = model(tokens())
    assert logits.shape == (3, 10, 23)
    labels = torch.randint(0, 23, (3, 10), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(math.log(23), abs=0.2)
    (loss + (model.aux_loss() or 0.0)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("vocab_size", [65, 1024])
@pytest.mark.parametrize("tied", [True, False])
def test_first_loss_of_the_shape_that_is_trained(vocab_size: int, tied: bool) -> None:
    """Tied embeddings 384 wide would start at 7.7 for a character vocabulary, not at 4.2."""
    torch.manual_seed(0)
    model = ModernDecoderLM(
        ModelConfig(
            vocab_size=vocab_size,
            d_model=384,
            n_layers=6,
            n_heads=6,
            max_seq_len=64,
            tie_embeddings=tied,
        )
    )
    x = torch.randint(0, vocab_size, (4, 65))
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.03)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_backends_are_equal_in_values_and_gradients(variant: dict) -> None:
    results = []
    if variant.get("attention") == "linear":
        pytest.skip("linear attention has no kernels")
    for backend in ("sdpa", "manual"):
        model = make(**variant, attention_backend=backend, init_std=0.2)
        logits = model(tokens())
        F.cross_entropy(logits.flatten(0, 1), tokens().flatten()).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_activation_checkpointing_changes_no_gradient(variant: dict) -> None:
    grads = []
    for enabled in (False, True):
        model = make(**variant, dropout=0.2).train()
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(1)
        F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_activation_checkpointing_serves_a_stage_without_dropout() -> None:
    """DPO trains in eval mode: there, too, a block's activations are not kept."""
    kept = []
    for enabled in (False, True):
        model = make().eval()
        model.set_activation_checkpointing(enabled)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, to=saved: to.append(x.numel()) or x, lambda x: x
        ):
            model(tokens())
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3


def test_initial_spread() -> None:
    model = make(d_model=128, n_layers=8, d_ff=512, init_std=0.03, bias=True, ffn="standard")
    weights = model.weights()
    assert weights["embedding.weight"].std().item() == pytest.approx(0.03, rel=0.1)
    assert weights["blocks.3.attention.qkv.weight"].std().item() == pytest.approx(0.03, rel=0.1)
    for name in ("attention.out", "ffn.down"):
        std = weights[f"blocks.5.{name}.weight"].std().item()
        assert std == pytest.approx(0.03 / 4, rel=0.1)
        assert not weights[f"blocks.5.{name}.bias"].any()


def test_at_m_selects_rows_of_all_logits() -> None:
    model = make().eval()
    at = torch.tensor([3, 29, 0])
    torch.testing.assert_close(model(tokens(), at_M=at), model(tokens()).flatten(0, 1)[at])


def test_dropout_acts_in_training_only() -> None:
    model = make(dropout=0.5)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_compute_dtypes() -> None:
    model = make()
    assert model(tokens()).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens()).dtype is torch.bfloat16
        assert model(tokens(), doc_ids_BT=torch.zeros(3, 10)).dtype is torch.bfloat16
    assert model.to(torch.bfloat16)(tokens()).dtype is torch.bfloat16


def test_bfloat16_is_near_float32() -> None:
    model = make(init_std=0.1, moe={"n_experts": 4}).eval()
    expected = model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        near = model(tokens()).float()
    assert (near - expected).abs().max() < 0.05 * expected.abs().max()


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = make(moe={"n_experts": 4})
    assert all(p.is_meta for p in model.parameters())
    assert model.cost(16).params == make(moe={"n_experts": 4}).cost(16).params


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rmsnorm'"):
        make(norm="rmsnrm")
    with pytest.raises(ConfigError, match="unknown option 'base'"):
        make(position={"name": "rope", "base": 1.0})
    with pytest.raises(ConfigError, match="unknown activation"):
        make(ffn="standard", activation="tan")
    with pytest.raises(ConfigError, match="'sdpa' has no softcap: use one of"):
        make(softcap=5.0, attention_backend="sdpa")
    with pytest.raises(ConfigError, match="'flex' has no dropout"):
        make(dropout=0.1, attention_backend="flex")
    with pytest.raises(ConfigError, match="attention=linear has no logits"):
        make(attention="linear", position="alibi")
    with pytest.raises(ConfigError, match="needs attention=window in all layers"):
        make(attention="window", window=3, window_pattern="SL").new_streaming_cache()
    with pytest.raises(ConfigError, match="17 tokens exceed max_seq_len=16"):
        make()(tokens(1, 17))


def test_importing_models_needs_no_heavy_library() -> None:
    code = (
        "import sys, modern_llm.models; "
        "heavy = {'transformers', 'datasets', 'tokenizers', 'accelerate', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

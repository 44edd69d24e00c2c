"""What a forward keeps, against the storages that autograd saves."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM
from modern_llm.models.memory import Pass, activations
from modern_llm.training.objectives import token_loss_sum

ROOT = Path(__file__).resolve().parents[2]
ROWS, LENGTH = 3, 320
SIZES = dict(vocab_size=200, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=LENGTH)
GPT2 = dict(norm="layernorm", ffn="standard", position="learned", bias=True, n_kv_heads=4)
WINDOW = dict(attention="window", window=96)
VARIANTS = [
    {},
    GPT2,
    dict(ffn="standard", activation="relu"),
    dict(ffn="geglu", norm="layernorm_nobias", position="sinusoidal"),
    dict(ffn="relu2", norm_position="post", tie_embeddings=False),
    dict(norm="scalenorm", qk_norm=True),
    dict(qk_norm=True, position="none"),
    dict(moe=dict(n_experts=4, top_k=2)),
    dict(moe=dict(n_experts=4, top_k=1, every=2), bias=True, ffn="standard"),
    WINDOW,
    dict(WINDOW, n_kv_heads=4, qk_norm=True),
    dict(WINDOW, n_sinks=4, window_pattern="SL", position="none"),
    dict(WINDOW, attention_backend="sdpa"),
    dict(WINDOW, attention_backend="sdpa", sink="learned"),
    dict(WINDOW, attention_backend="sdpa", position="alibi"),
    dict(position="alibi", n_kv_heads=4),
    dict(position="alibi", sink="learned"),
    dict(sink="learned"),
    dict(attention="linear"),
    dict(attention="linear", qk_norm=True),
    dict(attention="linear", n_kv_heads=4, position="none"),
    dict(dropout=0.1),
    dict(GPT2, dropout=0.1),
    dict(softcap=20.0),
    *(dict(attention_backend=name) for name in ("sdpa", "blocks", "manual")),
]
MASKED = [{}, dict(n_kv_heads=4), WINDOW, dict(attention="linear"), dict(position="alibi")]


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copies(model: ModernDecoderLM, precision: str) -> int:
    """Bytes of the bf16 copies of all matrices that are multiplied by, the head's among them."""
    if precision == "fp32":
        return 0
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim > 1 and n.startswith(("blocks", "head"))]
    tied = [model.embedding.weight] if model.head is None else []
    return 2 * sum(p.numel() for p in matrices + tied)


def kept(variant: dict, precision: str, *, masked: bool) -> tuple[float, float]:
    """Predicted and measured bytes."""
    config = ModelConfig(**{**SIZES, **variant})
    torch.manual_seed(0)
    model = ModernDecoderLM(config)
    tokens_BT = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    options = {}
    if masked:
        options["doc_ids_BT"] = torch.arange(LENGTH).expand(ROWS, -1) // 100

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return token_loss_sum(model(tokens_BT, **options), tokens_BT)

    measured = benchmark().saved(forward, model)
    number = 2 if precision == "bf16" else 4
    step = Pass(ROWS, LENGTH, number, on_gpu=False, masked=masked)
    return activations(config, step).kept() + copies(model, precision), measured


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_kept(variant: dict, precision: str) -> None:
    predicted, measured = kept(variant, precision, masked=False)
    assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", MASKED, ids=str)
def test_what_is_kept_of_packed_documents(variant: dict, precision: str) -> None:
    predicted, measured = kept(variant, precision, masked=True)
    assert predicted == pytest.approx(measured, rel=0.2)


def test_the_parts_are_the_blocks() -> None:
    for variant in VARIANTS:
        step = activations(ModelConfig(**{**SIZES, **variant}), Pass(ROWS, LENGTH))
        assert sum(step.parts.values()) == pytest.approx(sum(step.blocks))
        assert len(step.blocks) == SIZES["n_layers"]


def test_gpu_and_cpu_differ_where_their_kernels_do() -> None:
    """A GPU keeps no normalised copy for RMS norm, and one byte a dropped number, not four."""
    config = ModelConfig(**{**SIZES, "dropout": 0.1, "n_kv_heads": 4})
    gpu, cpu = (activations(config, Pass(1, LENGTH, on_gpu=on)) for on in (True, False))
    numbers = LENGTH * SIZES["d_model"]
    assert cpu.parts["norms"] - gpu.parts["norms"] == 2 * 2 * 4 * numbers
    assert cpu.parts["dropout"] - gpu.parts["dropout"] == 2 * 2 * 3 * numbers


@pytest.mark.parametrize(
    ("variant", "number", "repeated"),
    [({}, 2, True), (dict(n_kv_heads=4), 2, False), ({}, 4, False)],
)
def test_a_mask_repeats_the_keys_of_grouped_heads_on_a_gpu(
    variant: dict, number: int, repeated: bool
) -> None:
    """In float32 they are repeated without a mask too, so that it adds nothing."""
    config = ModelConfig(**{**SIZES, **variant})
    plain, masked = (
        activations(config, Pass(2, LENGTH, number, masked=hidden)) for hidden in (False, True)
    )
    copies = 2 * number * 2 * LENGTH * SIZES["d_model"]  # keys and values of two rows, all heads
    grown = SIZES["n_layers"] * copies * repeated
    assert sum(masked.blocks) - sum(plain.blocks) == grown


def test_chunks_of_the_loss_do_not_grow_with_the_batch() -> None:
    config = ModelConfig(**SIZES)
    few, many = (activations(config, Pass(rows, LENGTH, loss_chunk=64)) for rows in (1, 8))
    whole = activations(config, Pass(8, LENGTH))
    per_row = 4 * LENGTH * SIZES["d_model"]
    assert many.loss - few.loss == 7 * per_row
    assert many.loss_forward < whole.loss_forward / 2

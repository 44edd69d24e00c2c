"""What an engine builds and sums: first weights to the bit, memory, one mean over all ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launching import Launcher
from safetensors.torch import load_file

from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM, VerifierModel

SIZES = {"vocab_size": 257, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False, "bias": True},
    "learned positions": {"position": "learned", "norm": "layernorm", "norm_position": "post"},
    "experts": {"moe": {"n_experts": 3, "top_k": 2}},
    "sinks": {"sink": "learned", "qk_norm": True, "n_kv_heads": 2},
    "linear": {"attention": "linear"},
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_have_the_bits_of_the_whole(ranks: Launcher, tmp_path: Path, world_size: int) -> None:
    """Made without memory and drawn again, on every rank the part of what the constructor draws."""
    models = {name: {**SIZES, **options} for name, options in MODELS.items()}
    ranks(world_size, "initial", models=models, folder=str(tmp_path))
    for kind, made in (("decoder", ModernDecoderLM), ("verifier", VerifierModel)):
        for name, options in models.items():
            torch.manual_seed(5)
            expected = made(ModelConfig(**options)).weights()
            given = load_file(tmp_path / f"{kind}-{name}.safetensors")
            assert given.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(given[key], tensor), (kind, name, key)


def test_no_rank_ever_has_the_whole_model(ranks: Launcher, tmp_path: Path) -> None:
    """While it is built and while it is gathered to be saved; shares of the model's bytes."""
    sizes = {**SIZES, "d_model": 64, "n_layers": 8}
    ranks(3, "memory", model=sizes, folder=str(tmp_path))
    for rank in range(3):
        shares = json.loads((tmp_path / f"{rank}.json").read_text())
        assert shares["built"] < 0.6, rank  # a third, and one block or matrix at a time
        assert shares["part"] < 0.36
        if rank > 0:
            assert shares["gathered"] < 0.6, rank
        else:
            assert shares["gathered"] > 1.0  # what is written is there once, beside the part


UNITS = {  # supervised tokens of the rows of one step
    "ragged": [7, 1, 16, 3, 9, 2, 5, 11],
    "a micro-batch without any": [4, 0, 7, 0, 1, 0, 16, 0],
    "a rank without any": [4, 0, 7, 0, 1, 0, 16, 0],
}


@pytest.mark.parametrize("engine", ["ddp", "zero1", "fsdp"])
def test_the_gradient_is_of_one_mean_over_all_units(
    ranks: Launcher, tmp_path: Path, engine: str
) -> None:
    """Against float64 and one batch, whatever each rank and each micro-batch has to learn from."""
    for name, units in UNITS.items():
        micro = 1 if name == "a rank without any" else 2
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        rows = [*units] if micro == 1 else [units[i] for i in (0, 2, 1, 3, 4, 6, 5, 7)]
        options = {"model": SIZES, "engine": engine, "units": rows, "micro": micro}
        ranks(2, "accumulate", folder=str(folder), **options)
        torch.manual_seed(5)
        model = ModernDecoderLM(ModelConfig(**SIZES)).double()
        tokens_BT, labels_BT = step_rows(rows)
        logits = model(tokens_BT).flatten(0, 1)
        loss = F.cross_entropy(logits, labels_BT.flatten(), ignore_index=-100)
        loss.backward()  # torch's mean over what is not ignored
        told = json.loads((folder / "stats.json").read_text())
        assert told["units"] == sum(rows)
        assert told["loss"] == pytest.approx(loss.item(), rel=1e-6)
        given = load_file(folder / "gradients.safetensors")
        expected = {n: p.grad for n, p in model.named_parameters()}
        norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
        assert told["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for key, gradient in expected.items():
            far = (given[key].double() - gradient).norm() / gradient.norm()
            assert far < 1e-5, (name, key)


def step_rows(units: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 16 tokens, of which the last so many are supervised; as in `jobs`."""
    rng = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(0, SIZES["vocab_size"], (len(units), 17), generator=rng)
    labels_BT = tokens_BT[:, 1:].clone()
    for row, count in enumerate(units):
        labels_BT[row, : 16 - count] = -100
    return tokens_BT[:, :-1], labels_BT

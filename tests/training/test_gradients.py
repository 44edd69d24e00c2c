import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modern_llm.training.gradients import gradient_statistics


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.unused = nn.Linear(3, 1)


def test_statistics_are_those_of_all_entries_together() -> None:
    torch.manual_seed(0)
    model = Model()
    for name, parameter in model.named_parameters():
        if not name.startswith("unused"):
            parameter.grad = torch.randn_like(parameter) * 3 + 1
    told = gradient_statistics(model.named_parameters())
    flat = {
        name: parameter.grad.numpy().astype(np.float64).ravel()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    everything = np.concatenate(list(flat.values()))
    expected = {
        "gradient.mean": everything.mean(),
        "gradient.std": everything.std(),
        "gradient.min": everything.min(),
        "gradient.max": everything.max(),
        "gradient.norm.embedding": np.linalg.norm(flat["embedding.weight"]),
    }
    for i in range(2):
        layer = np.concatenate([flat[f"blocks.{i}.weight"], flat[f"blocks.{i}.bias"]])
        expected[f"gradient.norm.blocks.{i}"] = np.linalg.norm(layer)
    assert set(told) == set(expected)
    for name, value in expected.items():
        assert told[name].item() == pytest.approx(value, rel=1e-12)


def test_no_gradient_has_no_statistics() -> None:
    assert gradient_statistics(Model().named_parameters()) == {}


def test_rows_have_them_at_their_steps(
    cli: Callable[..., Any], make_tiny: Callable[..., Path]
) -> None:
    """The norms of the parts make up the norm that the row has anyway, before clipping."""
    config = make_tiny({"pretrain.training.grad_log_every": 2})
    done = cli("run", "--config", config, "--stage", "pretrain")
    assert done.returncode == 0, done.stderr
    lines = (config.parent / "runs" / "tiny" / "pretrain" / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, lines.splitlines()) if row["kind"] == "train"]
    assert [row["step"] for row in rows if "gradient.std" in row] == [2, 4]
    for row in rows:
        parts = [value for name, value in row.items() if name.startswith("gradient.norm.")]
        if parts:
            assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-5)

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from modern_llm.config import PipelineConfig


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


FAKE = _load("fake_run")


@pytest.fixture(scope="session")
def config() -> PipelineConfig:
    def stage(**options: Any) -> dict[str, Any]:
        training = {"max_steps": 400, "batch_size": 8, "micro_batch_size": 8, "lr": 3e-3}
        return {"data": [{"name": "synthetic"}], "training": training, **options}

    return PipelineConfig.model_validate(
        {
            "name": "made-up",
            "description": "numbers | drawn",
            "model": {
                "vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256,
            },
            "pretrain": stage(), "sft": stage(), "dpo": stage(), "verifier": stage(),
        }
    )  # fmt: skip


@pytest.fixture
def fake(config: PipelineConfig, tmp_path: Path) -> Path:
    """A whole, good run folder."""
    run: Path = FAKE.build(tmp_path / "runs", config.model_dump(mode="json"), config.sha256())
    return run

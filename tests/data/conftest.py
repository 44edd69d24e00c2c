import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import DataConfig, SourceConfig, TokenizerConfig
from modern_llm.data.sources import Source, open_source
from modern_llm.data.tokenizer import Tokenizer, build_tokenizer

OpenSynthetic = Callable[..., Source]


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Folder of real data sets, or skip."""
    named = os.environ.get("MODERN_LLM_DATA")
    root = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    if not root.is_dir():
        pytest.skip("needs real data: set MODERN_LLM_DATA")
    return root


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """No data root, an empty cache."""
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    return DataConfig(cache_dir=tmp_path / "cache", max_bad_rows=2)


@pytest.fixture
def real_data(real_root: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(root=real_root, cache_dir=tmp_path / "cache")


@pytest.fixture
def synthetic(data: DataConfig) -> OpenSynthetic:
    def make(**options: Any) -> Source:
        return open_source(SourceConfig(name="synthetic", options=options), data)

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small byte-level BPE."""
    config = DataConfig(cache_dir=tmp_path_factory.mktemp("tokenizer"))
    source = open_source(SourceConfig(name="synthetic", options={"rows": 300}), config)
    return build_tokenizer(
        TokenizerConfig(),
        vocab_size=400,
        texts=lambda: (row["text"] for row in source.rows("train")),
        data=config,
    )

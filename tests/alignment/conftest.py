"""Small models of every kind, token stores written by hand, and parts of the tiny run."""

import importlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm import cli
from modern_llm.alignment.stages.base import load_policy
from modern_llm.config import DataConfig, ModelConfig, PipelineConfig, load_config
from modern_llm.data.sources.base import RowCounts, Source
from modern_llm.data.store import TokenStore, build_store
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.artifacts import sha256_file, sha256_json
from modern_llm.training.checkpoint import read_checkpoint

VOCAB = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    def make(**changes: Any) -> ModelConfig:
        sizes = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
        return ModelConfig(**{**sizes, "init_std": 0.2, **changes})

    return make


@pytest.fixture
def make_model(make_config: Callable[..., ModelConfig]) -> Callable[..., ModernDecoderLM]:
    """A decoder in eval mode whose logits are far from uniform."""

    def make(*, seed: int = 0, **changes: Any) -> ModernDecoderLM:
        torch.manual_seed(seed)
        return ModernDecoderLM(make_config(**changes)).eval()

    return make


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """A store of hand-written records: ids of each segment, then the columns."""

    def make(
        records: Sequence[tuple[Any, ...]], segments: Sequence[str], *, columns: Sequence[str] = ()
    ) -> TokenStore:
        return build_store(
            tmp_path / "cache", segments=segments, key={"records": list(records)},
            records=iter(records), n_vocab=VOCAB, pad_id=2, columns=columns,
        )  # fmt: skip

    return make


def ragged_pairs(n: int, *, seed: int = 0, longest: int = 9) -> list[tuple[list[int], ...]]:
    """Prompts of 3 to 8 tokens, answers of 1 to ``longest``, ids from 5 on."""
    rng = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> list[int]:
        size = int(torch.randint(least, most + 1, (), generator=rng))
        return torch.randint(5, VOCAB, (size,), generator=rng).tolist()

    return [(ids(3, 8), ids(1, longest), ids(1, longest)) for _ in range(n)]


@pytest.fixture
def pairs() -> list[tuple[list[int], ...]]:
    return ragged_pairs(8)


@pytest.fixture
def pair_records(
    make_store: Callable[..., TokenStore], pairs: list[tuple[list[int], ...]]
) -> TokenStore:
    return make_store(pairs, ("prompt", "chosen", "rejected"))


@pytest.fixture(scope="session")
def tiny(tiny_run: Any) -> PipelineConfig:
    """The resolved config of the tiny run."""
    return load_config(tiny_run.config)


@pytest.fixture(scope="session")
def tokenizer(tiny_run: Any) -> Tokenizer:
    return Tokenizer.load(tiny_run.run / "sft" / "final" / "tokenizer.json")


@pytest.fixture(scope="session")
def policy(tiny_run: Any) -> ModernDecoderLM:
    """The policy of the tiny run after SFT; read it, never train it."""
    return load_policy(read_checkpoint(tiny_run.run / "sft" / "final"), torch.device("cpu"))


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=tmp_path / "cache")


class RowsSource(Source):
    """Rows given in a test, the same for every split unless ``held_out`` is given."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], kind: str, held_out: Sequence[dict[str, Any]] | None
    ) -> None:
        self.kind, self.description = kind, f"rows of a test ({kind})"
        self.by_split = {"train": rows, "validation": held_out or rows, "test": held_out or rows}

    def rows(self, split: str, counts: RowCounts | None = None) -> Iterator[dict[str, Any]]:
        yield from self.by_split[split]

    def fingerprint(self, split: str = "train") -> str:
        return sha256_json([split, list(map(str, self.by_split[split]))])


@pytest.fixture
def make_source() -> Callable[..., Source]:
    def make(
        rows: Sequence[dict[str, Any]],
        *,
        kind: str = "instruct",
        held_out: Sequence[dict[str, Any]] | None = None,
    ) -> Source:
        return RowsSource(rows, kind, held_out)

    return make


class Place:
    """A folder with a config of its own and, when wanted, a copy of the finished tiny run."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config
        self.run = folder / "runs" / "tiny"

    def main(self, *arguments: object, command: str = "run", report: bool = False) -> int:
        """The command line in this process, without the report where that is not looked at."""
        with pytest.MonkeyPatch.context() as patch:
            if not report:
                patch.setattr(cli.pipeline, "_conclude", lambda *args, **kwargs: None)
            return cli.main([command, "--config", str(self.config), *map(str, arguments)])

    def runs(self) -> list[str]:
        """Names in the output folder."""
        return sorted(path.name for path in (self.folder / "runs").iterdir())


@pytest.fixture
def place(make_tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Place]:
    def make(run: Path | None = None, changes: dict[str, Any] | None = None) -> Place:
        folder = tmp_path / "place"
        made = Place(folder, make_tiny(changes, folder=folder))
        if run is not None:
            for name in ("runs", "report", "cache"):
                shutil.copytree(run.parents[1] / name, folder / name)
            shutil.copy2(run.parents[1] / "ledger.jsonl", folder)
        return made

    return make


def everything(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file below a folder, locks left out."""
    return {
        str(path.relative_to(folder)): (sha256_file(path), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, tuple[str, int]]]:
    return everything


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same numbers to the bit."""
    a, b = read_checkpoint(one).weights, read_checkpoint(other).weights
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def equal_weights() -> Callable[[Path, Path], bool]:
    return same_weights


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of random weights, 32 tokens of context and a byte tokenizer, as a local folder."""
    import tokenizers
    import transformers

    path, end = tmp_path_factory.mktemp("gpt2"), "<|endoftext|>"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([end])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=256,
        eos_token_id=256,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data root and no hub, also for libraries that have read the environment already."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    for name in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(importlib.import_module(name), "HF_HUB_OFFLINE", True)

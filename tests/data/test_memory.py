"""Preparing and loading a text takes memory that does not grow with it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = textwrap.dedent("""
    import json, os, sys
    from pathlib import Path

    from modern_llm.config import DataConfig, SourceConfig, TokenizerConfig
    from modern_llm.data.loader import TextLoader
    from modern_llm.data.prepare import text_store
    from modern_llm.data.sources import open_source
    from modern_llm.data.tokenizer import build_tokenizer

    def resident_mb(field="VmRSS"):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(l for l in lines if l.startswith(field)).split()[1]) / 1024

    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    data = DataConfig(cache_dir=folder / "cache")
    options = {"path": str(folder / "big.txt"), "validation_path": str(folder / "big.txt"),
               "test_path": str(folder / "big.txt")}
    source = open_source(SourceConfig(name="text", options=options), data)
    config = TokenizerConfig(max_train_mb=1)
    texts = lambda: (row["text"] for row in source.rows("train"))
    tokenizer = build_tokenizer(config, vocab_size=2000, texts=texts, data=data, fingerprint="x")
    before = resident_mb()
    store = text_store([source], "train", tokenizer, data)
    prepared = resident_mb("VmHWM") - before
    loader = TextLoader([store], [None], seq_len=1024, batch_size=16, micro_batch_size=16, seed=0)
    before, most = resident_mb(), 0.0
    for step in range(steps or loader.steps_per_epoch):
        for batch in loader.batches(step):
            batch.labels_BT.sum()
        most = max(most, resident_mb() - before)
    print(json.dumps({"prepared_mb": prepared, "loading_mb": most, "tokens": store.n_tokens}))
""")


def write_text(path: Path, size: int) -> None:
    """``size`` bytes of words; each million differs, so that nothing is shared."""
    words = ["the", "of", "river", "stone", "green", "table", "seven", "window", "under", "small"]
    with path.open("w") as file:
        written = block = 0
        while written < size:
            line = " ".join(words[(i * (block + 3) + i // 7) % len(words)] for i in range(600))
            text = f"Page {block}\n{line}.\n\n" * 250
            written += file.write(text[: size - written])
            block += 1


def measure(folder: Path, size: int, steps: int) -> dict[str, float]:
    write_text(folder / "big.txt", size)
    command = [sys.executable, "-c", SCRIPT, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    print(found)
    return found


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def test_60_mb_of_text(tmp_path: Path) -> None:
    found = measure(tmp_path, 60_000_000, 0)
    assert found["prepared_mb"] < 200
    assert found["loading_mb"] < 100


@pytest.mark.huge
def test_1_gb_of_text(tmp_path: Path) -> None:
    found = measure(tmp_path, 1_000_000_000, 0)
    assert found["prepared_mb"] < 200
    assert found["loading_mb"] < 200

"""A store is the same however it is cut and by however many processes it was encoded."""

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modern_llm.config import DataConfig, SourceConfig
from modern_llm.data import workers
from modern_llm.data.collate import collate_pairs
from modern_llm.data.loader import BucketLoader, PackedLoader, TextLoader
from modern_llm.data.making import Making, making
from modern_llm.data.prepare import instruct_store, pair_store, text_store
from modern_llm.data.shards import MAX_MAPPED
from modern_llm.data.sources import Source, open_source
from modern_llm.data.store import TokenStore, build_from_batches, build_store
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.data.writer import encoded
from modern_llm.errors import DataError
from modern_llm.runtime.artifacts import sha256_json

SIZES: dict[str, Any] = {"batch_size": 6, "micro_batch_size": 3, "seed": 4}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches of few rows, so that small sets have many shards."""
    monkeypatch.setattr(workers, "BATCH_ROWS", 16)


def synthetic(kind: str, data: DataConfig) -> list[Source]:
    options = {"kind": kind, "rows": 250, "held_out_rows": 20}
    return [
        open_source(SourceConfig(name="synthetic", options={**options, "seed": seed}), data)
        for seed in (0, 1)
    ]


def stores(tokenizer: Tokenizer, folder: Path, settings: Making) -> dict[str, TokenStore]:
    data = DataConfig(cache_dir=folder)
    with making(settings):
        return {
            "text": text_store(synthetic("text", data), "train", tokenizer, data, max_rows=240),
            "instruct": instruct_store(
                synthetic("instruct", data), "train", tokenizer, data, max_tokens=24
            ),
            "pairs": pair_store(
                synthetic("pairs", data), "train", tokenizer, data, max_prompt=24, max_answer=12
            ),
        }


def all_batches(found: dict[str, TokenStore]) -> Iterator[Any]:
    """Every tensor of some steps and of the fixed pass, with all loaders."""
    text = found["text"]
    loaders = [
        TextLoader([text], [None], seq_len=33, **SIZES),
        TextLoader([text], [None], seq_len=50, doc_mask=True, **SIZES),
        PackedLoader(found["instruct"], seq_len=64, replay=text, replay_share=0.3, **SIZES),
        BucketLoader(found["pairs"], collate=collate_pairs, **SIZES),
    ]
    for loader in loaders:
        yield loader.fingerprint
        for batch in (*loader.batches(0), *loader.batches(9), *loader.one_pass()):
            for tensor in vars(batch).values():
                yield None if tensor is None else tensor.numpy().tobytes()


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("shard_tokens", [1, 3000])
def test_shards_and_jobs_change_nothing(
    tokenizer: Tokenizer, tmp_path: Path, jobs: int, shard_tokens: int
) -> None:
    whole = stores(tokenizer, tmp_path / "whole", Making())
    cut = stores(tokenizer, tmp_path / "cut", Making(jobs=jobs, shard_tokens=shard_tokens))
    for name, store in cut.items():
        assert len(whole[name].shards) == 1 and len(store.shards) > (20 if shard_tokens == 1 else 2)
        assert store.folder.name == whole[name].folder.name
        assert store.fingerprint == whole[name].fingerprint
        assert (store.sources, store.counts) == (whole[name].sources, whole[name].counts)
        assert store.tokens.tolist() == whole[name].tokens.tolist()
        rows = np.arange(len(store))
        assert np.array_equal(store.bounds(rows), whole[name].bounds(rows))
        assert np.array_equal(store.lengths(), whole[name].lengths())
    assert list(all_batches(cut)) == list(all_batches(whole))
    assert whole["instruct"].counts.dropped["answer too long"] > 10


def test_the_fingerprint_is_that_of_one_flat_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """So a run goes on with a store that an earlier version wrote as one file."""
    store = stores(tokenizer, tmp_path, Making(shard_tokens=1000))["pairs"]
    flat = {"tokens.bin": store.tokens[:], "offsets.bin": store.bounds(np.arange(len(store)))}
    files = {
        name: {"bytes": a.nbytes, "sha256": hashlib.sha256(a.tobytes()).hexdigest()}
        for name, a in flat.items()
    }
    assert store.fingerprint == sha256_json([["prompt", "chosen", "rejected"], [], "uint16", files])


def test_columns_of_several_shards(tmp_path: Path) -> None:
    records = [([i % 300] * 600, [1], i / 7) for i in range(3000)]
    with making(Making(shard_tokens=1)):
        store = build_store(
            tmp_path, segments=("prompt", "answer"), key={}, records=iter(records), n_vocab=300,
            pad_id=0, columns=("label",),
        )  # fmt: skip
    assert len(store.shards) > 5
    assert store.columns["label"].tolist() == [np.float32(r[2]) for r in records]
    assert store.record(2999)[0].tolist() == records[2999][0]


# ---- stopped, and two at once

SCRIPT = textwrap.dedent("""
    import json, os, random, sys, time
    from pathlib import Path

    from modern_llm.config import DataConfig, SourceConfig
    from modern_llm.data import workers
    from modern_llm.data.making import Making, making
    from modern_llm.data.prepare import text_store
    from modern_llm.data.sources import open_source
    from modern_llm.data.tokenizer import Tokenizer

    def audit(event, args):
        if event == "open" and isinstance(args[1], str) and "w" in args[1]:
            told.append(str(args[0]))

    def rows(self, split, counts=None):
        for number, row in enumerate(original(self, split, counts)):
            if number % 100 == 0:
                time.sleep(random.random() * pause)
            yield row

    if __name__ == "__main__":
        folder, tokenizer = sys.argv[1:3]
        jobs, pause = int(sys.argv[3]), float(sys.argv[4])
        told = []
        sys.addaudithook(audit)
        workers.BATCH_ROWS = 16
        data = DataConfig(cache_dir=Path(folder))
        options = {"kind": "text", "rows": 1500}
        source = open_source(SourceConfig(name="synthetic", options=options), data)
        original = type(source).rows
        type(source).rows = rows
        time.sleep(random.random() * pause)
        with making(Making(jobs=jobs, shard_tokens=8000)):
            store = text_store([source], "train", Tokenizer.load(Path(tokenizer)), data)
        parts = [p for p in told if "stores" in p and p.endswith(".bin")]
        print(json.dumps({"fingerprint": store.fingerprint, "shards": len(store.shards),
                          "rows": len(store), "sources": store.sources, "wrote": len(parts)}))
""")


@pytest.fixture
def start(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Any]:
    """Prepare a text in a process of its own; the files that it writes are counted."""
    script, vocabulary = tmp_path / "prepare.py", tmp_path / "tokenizer.json"
    script.write_text(SCRIPT)
    tokenizer.save(vocabulary)
    running: list[subprocess.Popen[str]] = []

    def run(folder: Path, *, jobs: int = 1, pause: float = 0.0) -> "subprocess.Popen[str]":
        command = [sys.executable, script, folder, vocabulary, jobs, pause]
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def whole_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("stores/.tmp-*/shard-*.json"))


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_preparation_goes_on_behind_its_whole_shards(
    tmp_path: Path, start: Any, jobs: int
) -> None:
    expected = result(start(tmp_path / "whole"))
    folder, kept = tmp_path / "killed", 0
    for _ in range(3):
        process = start(folder, jobs=jobs, pause=0.6)
        begun = time.monotonic()
        while len(whole_shards(folder)) <= kept and time.monotonic() - begun < 60:
            time.sleep(0.02)
        workers_of_it = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not list(folder.glob("stores/[0-9a-f]*"))  # nothing is visible
        kept = len(whole_shards(folder))
        begun = time.monotonic()
        while any(map(alive, workers_of_it)) and time.monotonic() - begun < 20:
            time.sleep(0.05)
        assert not any(map(alive, workers_of_it)), "a worker outlives its parent"
    assert kept >= 3
    found = result(start(folder, jobs=jobs))
    assert found["wrote"] == 2 * (expected["shards"] - kept)  # tokens and offsets of the rest
    assert {**found, "wrote": 0} == {**expected, "wrote": 0}
    (store,) = (folder / "stores").iterdir()
    names = [
        f"{kind}-{i:05d}.bin" for kind in ("offsets", "tokens") for i in range(found["shards"])
    ]
    assert sorted(p.name for p in store.iterdir()) == sorted([*names, "manifest.json"])


def test_an_error_of_the_data_keeps_the_shards_that_are_whole(tmp_path: Path) -> None:
    """Such as a process that encodes and was killed, or a file that could not be read once."""
    seen: list[int] = []

    def batches(after: int, *, breaks: bool) -> Iterator[Any]:
        seen.append(after or 0)
        for i in range(after or 0, 10):
            if breaks and i == 7:
                raise DataError("a process that encodes was killed")
            yield encoded([(list(range(50)),)] * 4, np.uint16, 1, i + 1)

    options: Any = {"segments": ("text",), "key": {"what": "x"}, "n_vocab": 100, "pad_id": 0}
    with making(Making(shard_tokens=300)):
        with pytest.raises(DataError, match="was killed"):
            build_from_batches(tmp_path, batches=lambda a: batches(a, breaks=True), **options)
        store = build_from_batches(tmp_path, batches=lambda a: batches(a, breaks=False), **options)
    assert len(store) == 40 and store.n_tokens == 2000
    assert seen[0] == 0 and seen[1] >= 4


@pytest.mark.slow
def test_a_damaged_shard_of_a_stopped_preparation_is_made_again(tmp_path: Path, start: Any) -> None:
    expected = result(start(tmp_path / "whole"))
    folder = tmp_path / "killed"
    process = start(folder, pause=0.3)
    while len(whole_shards(folder)) < 3:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    damaged = whole_shards(folder)[1].with_name("tokens-00001.bin")
    damaged.write_bytes(damaged.read_bytes()[:-2])
    found = result(start(folder))
    assert found["wrote"] == 2 * (expected["shards"] - 1)
    assert found["fingerprint"] == expected["fingerprint"]


@pytest.mark.slow
def test_of_three_preparations_at_once_one_writes(tmp_path: Path, start: Any) -> None:
    expected = result(start(tmp_path / "whole"))
    for attempt in range(2):
        folder = tmp_path / f"race{attempt}"
        racers = [start(folder, jobs=1 + (i == 0), pause=0.1) for i in range(3)]
        found = [result(racer) for racer in racers]
        assert {one["fingerprint"] for one in found} == {expected["fingerprint"]}
        wrote = sorted(one["wrote"] for one in found)
        assert wrote == [0, 0, expected["wrote"]]  # one writer of all files
        assert len(list((folder / "stores").iterdir())) == 1


# ---- ten billion tokens

SHARDS, SHARD_TOKENS, DOC_TOKENS = 1000, 10_000_000, 5000
BIG = textwrap.dedent("""
    import builtins, json, resource, sys, time
    from pathlib import Path
    import numpy as np
    import torch
    from modern_llm.data.loader import TextLoader
    from modern_llm.data.store import TokenStore

    def resident_mb():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(l for l in lines if l.startswith("VmRSS")).split()[1]) / 1024

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    opened = []
    sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == "open" else None)
    before, begun = resident_mb(), time.perf_counter()
    store = TokenStore(Path(sys.argv[1]))
    loader = TextLoader([store], [None], seq_len=1024, batch_size=64, micro_batch_size=64, seed=0,
                        doc_mask=True)
    took = time.perf_counter() - begun
    at_start = [name for name in opened if name.endswith(".bin")]
    shards, sums = set(), 0
    for step in (0, 1, 70_000, loader.steps_per_epoch - 2):
        rows = loader.rows(step)
        shards |= set((rows * 1024 // 10_000_000).tolist())
        (batch,) = loader.batches(step)
        assert batch.tokens_BT.shape == (64, 1024)
        sums += int(batch.tokens_BT.sum())
        starts = rows[:, None] * 1024 + np.arange(1024)
        doc = torch.from_numpy(starts // 5000 - starts[:, :1] // 5000)
        assert torch.equal(batch.doc_ids_BT, doc)
    part = loader.parts[0]
    marked = [part.read(np.array([int(at) // 1024]))[0][0, int(at) % 1024] for at in sys.argv[2:]]
    print(json.dumps({"took_s": took, "grown_mb": resident_mb() - before, "at_start": at_start,
                      "tokens": store.n_tokens, "rows": len(part), "shards": len(shards),
                      "marked": [int(m) for m in marked], "sums": sums}))
""")


def sparse_store(folder: Path, marked: dict[int, int]) -> None:
    """A store of `SHARDS` shards of zeros, but for the marked tokens; its hashes are no hashes."""
    offsets = np.arange(0, SHARD_TOKENS, DOC_TOKENS, dtype=np.int64)
    content = np.stack([offsets, offsets + DOC_TOKENS], axis=1).tobytes()
    shards = []
    for number in range(SHARDS):
        files = {}
        tokens, bounds = folder / f"tokens-{number:05d}.bin", folder / f"offsets-{number:05d}.bin"
        with tokens.open("wb") as file:
            file.truncate(2 * SHARD_TOKENS)
            for at, token in marked.items():
                if at // SHARD_TOKENS == number:
                    file.seek(2 * (at % SHARD_TOKENS))
                    file.write(np.uint16(token).tobytes())
        bounds.write_bytes(content)
        for path in (tokens, bounds):
            state = path.stat()
            files[path.name] = {
                "bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": "0" * 64,
            }  # fmt: skip
        shards.append({"rows": len(offsets), "tokens": SHARD_TOKENS, "files": files})
    manifest = {
        "format": 2, "segments": ["text"], "columns": [], "dtype": "uint16", "pad_id": 0,
        "rows": SHARDS * len(offsets), "tokens": SHARDS * SHARD_TOKENS, "dropped": {},
        "fingerprint": "f" * 64, "key": {}, "sources": [], "shards": shards,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_ten_billion_tokens_in_a_thousand_shards(tmp_path: Path) -> None:
    marked = {0: 7, 4_294_967_296: 8, 5_000_000_001: 9, 9_999_999_998: 11}  # beyond 32 bits too
    sparse_store(tmp_path, marked)
    command = [sys.executable, "-c", BIG, str(tmp_path), *map(str, marked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["tokens"] == 10_000_000_000 and found["rows"] == 9_765_625
    assert found["at_start"] == []  # no shard is opened before it is read
    assert found["marked"] == list(marked.values())
    assert found["shards"] > MAX_MAPPED  # more than are mapped at once
    assert found["took_s"] < 2.0
    assert found["grown_mb"] < 60

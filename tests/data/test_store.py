import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modern_llm.data import lookup
from modern_llm.data.making import Making, making
from modern_llm.data.sources import RowCounts
from modern_llm.data.store import TokenStore, build_store
from modern_llm.errors import DataError
from modern_llm.runtime.artifacts import sha256_file

RECORDS = [([1, 2, 3], [4], 0.5), ([5], [], 1.0), ([], [6, 7], 0.0)]


def build(folder: Path, records: Any = RECORDS, **options: Any) -> TokenStore:
    settings = {"n_vocab": 300, "pad_id": 2, "columns": ("label",), "key": {"a": 1}}
    return build_store(
        folder, segments=("prompt", "answer"), records=iter(records), **(settings | options)
    )


def test_records_come_back(tmp_path: Path) -> None:
    store = build(tmp_path)
    assert len(store) == 3 and store.n_tokens == 7 and store.pad_id == 2
    assert [[list(s) for s in store.record(i)] for i in range(3)] == [
        list(map(list, r[:2])) for r in RECORDS
    ]
    assert store.bounds(np.arange(3)).tolist() == [[0, 3, 4], [4, 5, 5], [5, 5, 7]]
    assert store.lengths().tolist() == [[3, 1], [1, 0], [0, 2]]
    assert store.columns["label"].tolist() == [0.5, 1.0, 0.0]
    assert isinstance(store.tokens[:], np.memmap)


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_two_or_four_bytes(tmp_path: Path, n_vocab: int, dtype: type) -> None:
    last = n_vocab - 1
    store = build(tmp_path, [([last], [0], 1.0)], n_vocab=n_vocab)
    assert store.tokens.dtype == dtype
    assert store.tokens[0] == last


def test_many_records_over_flushes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 300, n).tolist(), [n], n / 7) for n in rng.integers(0, 400, 3000)]
    store = build(tmp_path, rows)
    assert len(store) == 3000
    for i in (0, 1023, 1024, 2999):
        assert store.record(i)[0].tolist() == rows[i][0]
        assert store.columns["label"][i] == np.float32(rows[i][2])


def unread() -> Iterator[Any]:
    raise AssertionError("the records were read")
    yield


def test_reused_by_key(tmp_path: Path) -> None:
    first = build(tmp_path)
    assert build(tmp_path, unread()).folder == first.folder
    assert build(tmp_path, key={"a": 2}).folder != first.folder
    assert build(tmp_path, pad_id=3).folder != first.folder
    assert build(tmp_path, key={"a": 2}).fingerprint == first.fingerprint  # content, not key


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first = build(tmp_path)
    changed = [([1, 2, 4], [4], 0.5), *RECORDS[1:]]
    moved = [([1, 2], [3, 4], 0.5), *RECORDS[1:]]
    prints = {
        build(tmp_path, rows, key={"b": i}).fingerprint for i, rows in enumerate([changed, moved])
    }
    assert len(prints | {first.fingerprint}) == 3


def test_manifest_holds_sizes_and_hashes(tmp_path: Path) -> None:
    counts = RowCounts(dropped={"empty answer": 4})
    store = build(tmp_path, counts=counts)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    names = {p.name for p in store.folder.iterdir()} - {"manifest.json"}
    (shard,) = manifest["shards"]
    assert (shard["rows"], shard["tokens"]) == (3, 7) and set(shard["files"]) == names
    for name, entry in shard["files"].items():
        state = (store.folder / name).stat()
        sha256 = sha256_file(store.folder / name)
        assert entry == {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": sha256}
    again = TokenStore(store.folder)
    assert again.counts.dropped == {"empty answer": 4} and again.counts.kept == 3


# ---- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"tokens-00000\.bin: 13 bytes, the manifest says 14"),
        (flip, r"tokens-00000\.bin: its content is not what was written"),
        (Path.unlink, r"tokens-00000\.bin: No such file.*copied in part"),
    ],
)
def test_damage_is_told_and_mended_when_asked(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    store = build(tmp_path)
    damage(store.folder / "tokens-00000.bin")
    with pytest.raises(DataError, match=told):
        TokenStore(store.folder)
    with pytest.raises(DataError, match=told + r".*; run 'modern-llm prepare-data'"):
        build(tmp_path, unread())
    with making(Making(repair=True)):
        assert build(tmp_path).fingerprint == store.fingerprint
    assert build(tmp_path, unread()).fingerprint == store.fingerprint
    assert any(p.name.startswith("damaged-") for p in (tmp_path / "stores").iterdir())


def test_a_file_with_another_time_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(tmp_path)
    path = store.folder / "tokens-00000.bin"
    path.write_bytes(path.read_bytes())  # as a copy that does not keep times
    assert build(tmp_path, unread()).fingerprint == store.fingerprint

    def hashed(path: Path) -> str:
        raise AssertionError(f"{path} is hashed again")

    monkeypatch.setattr(lookup, "sha256_file", hashed)
    assert build(tmp_path, unread()).fingerprint == store.fingerprint


def test_damage_without_a_trace_is_seen_where_all_is_hashed(tmp_path: Path) -> None:
    store = build(tmp_path)
    path = store.folder / "tokens-00000.bin"
    state = path.stat()
    flip(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    build(tmp_path, unread())
    with (
        making(Making(verify=True)),
        pytest.raises(DataError, match=r"tokens-00000\.bin: its content"),
    ):
        build(tmp_path, unread())


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            {"tokenizer": "bb" * 32},
            r"manifest\.json: it was made with .* bbbbbb.*not aaaaaa",
        ),
        ({"tokenizer": "aa" * 32, "x": 1}, r"manifest\.json: it was made with other data"),
    ],
)
def test_a_store_under_the_name_of_another(tmp_path: Path, key: dict[str, Any], told: str) -> None:
    ours, other = build(tmp_path, key={"tokenizer": "aa" * 32}), build(tmp_path, key=key)
    shutil.rmtree(ours.folder)
    other.folder.rename(ours.folder)
    with pytest.raises(DataError, match=told + r".*run 'modern-llm prepare-data'"):
        build(tmp_path, unread(), key={"tokenizer": "aa" * 32})


@pytest.mark.parametrize("manifest", ["", "[]", '{"format": 99}', '{"format": 2}'])
def test_not_a_store(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(DataError):
        TokenStore(tmp_path)


def test_nothing_left_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 too long"):
        build(tmp_path, [], counts=RowCounts(dropped={"too long": 3}))
    assert list((tmp_path / "stores").iterdir()) == []


def test_failing_rows_leave_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Any]:
        yield RECORDS[0]
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        build(tmp_path, failing())
    assert list((tmp_path / "stores").iterdir()) == []


SCRIPT = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from modern_llm.data.store import build_store

    def records():
        for i in range(3000):
            if i == 2500:
                print("half", flush=True)
                time.sleep(float(sys.argv[2]))
            yield [i % 300] * 20, [1]

    store = build_store(Path(sys.argv[1]), segments=("prompt", "answer"), key={"k": 1},
                        records=records(), n_vocab=300, pad_id=0)
    print(store.fingerprint, len(store), flush=True)
""")


def start(folder: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_build_leaves_nothing_visible(tmp_path: Path) -> None:
    process = start(tmp_path, 60)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    visible = [p for p in (tmp_path / "stores").iterdir() if not p.name.startswith(".tmp-")]
    assert visible == []
    out, _ = start(tmp_path, 0).communicate()
    assert out.split()[-1] == "3000"


def test_two_builders_end_with_one_store(tmp_path: Path) -> None:
    racers = [start(tmp_path, 0.5) for _ in range(2)]
    outputs = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    assert len({out.split("\n")[-2] for out, _ in outputs}) == 1
    assert len(list((tmp_path / "stores").iterdir())) == 1

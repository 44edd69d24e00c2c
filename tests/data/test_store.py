import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
    assert store.offsets.tolist() == [[0, 3, 4], [4, 5, 5], [5, 5, 7]]
    assert store.lengths().tolist() == [[3, 1], [1, 0], [0, 2]]
    assert store.columns["label"].tolist() == [0.5, 1.0, 0.0]
    assert isinstance(store.tokens, np.memmap)


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
    store = build(tmp_path, counts=counts, sources=[{"source": "x", "rows": 3}])
    manifest = json.loads((store.folder / "manifest.json").read_text())
    names = {p.name for p in store.folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, entry in manifest["files"].items():
        assert {k: v for k, v in entry.items() if k != "mtime_ns"} == {
            "bytes": (store.folder / name).stat().st_size,
            "sha256": sha256_file(store.folder / name),
        }
    again = TokenStore(store.folder)
    assert again.counts.dropped == {"empty answer": 4} and again.counts.kept == 3
    assert again.sources == [{"source": "x", "rows": 3}]


def test_damage_is_seen_and_built_again(tmp_path: Path) -> None:
    store = build(tmp_path)
    path = store.folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"tokens\.bin: 13 bytes"):
        TokenStore(store.folder)
    again = build(tmp_path)
    assert again.fingerprint == store.fingerprint
    assert any(p.name.startswith("damaged-") for p in (tmp_path / "stores").iterdir())


def test_one_changed_byte_is_seen(tmp_path: Path) -> None:
    store = build(tmp_path)
    path = store.folder / "tokens.bin"
    content = path.read_bytes()
    path.write_bytes(content)  # touched, but the same: hashed and accepted
    assert TokenStore(store.folder).fingerprint == store.fingerprint
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=r"tokens\.bin: its content"):
        TokenStore(store.folder)


@pytest.mark.parametrize("manifest", ["", "[]", '{"format": 99}', '{"format": 1}'])
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

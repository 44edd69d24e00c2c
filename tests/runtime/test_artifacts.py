import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.errors import ConfigError, DataError, ProtectedPathError
from modern_llm.runtime import artifacts
from modern_llm.runtime.artifacts import (
    JsonLines,
    back_up,
    new_folder,
    published_folder,
    sha256_file,
    sha256_json,
    to_json,
    write_bytes,
    write_json,
    write_text,
)
from modern_llm.runtime.files import free_bytes, locked
from modern_llm.runtime.names import sibling_names, standing_siblings

STAMPED = re.compile(r"result_\d{8}-\d{6}(-\d+)?\.json")
MakeDisk = Callable[..., Path]


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process that runs ``code`` on the arguments; it says ready and waits for a line first."""
    head = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from modern_llm.runtime import artifacts as a, files as f\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(*processes: "subprocess.Popen[str]") -> list[tuple[int, str, str]]:
    """Let all begin at once; return code, output and errors of each."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [process.communicate(timeout=60) for process in processes]
    return [(p.returncode, *told) for p, told in zip(processes, done, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- one file -----------------------------------------------------------------------------------


def test_a_new_file_is_written_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "result.json"

    assert write_json(path, {"b": 1, "a": [1.5, math.nan, -math.inf], "p": tmp_path}) == path

    assert json.loads(path.read_text()) == {"a": [1.5, None, None], "b": 1, "p": str(tmp_path)}
    assert path.read_text().startswith('{\n  "a"')
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]  # nothing temporary


def test_timestamp_never_touches_what_exists(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    os.utime(path, (1, 1))

    written = [write_text(path, f"new {i}") for i in range(3)]  # within one second: a counter

    assert (path.read_text(), path.stat().st_mtime) == ("old", 1)
    assert len({*written}) == 3
    assert all(p is not None and STAMPED.fullmatch(p.name) for p in written)
    assert [p.read_text() for p in written if p] == ["new 0", "new 1", "new 2"]


def test_skip_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert write_text(path, "old", on_exists="skip") == path
    os.utime(path, (1, 1))

    assert write_text(path, "new", on_exists="skip") is None

    assert (path.read_text(), path.stat().st_mtime) == ("old", 1)
    assert contents(tmp_path) == {"result.json": b"old"}


def test_replace_keeps_a_backup_of_each(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for text in ("one", "two", "three"):
        assert write_text(path, text, on_exists="replace") == path

    found = contents(tmp_path)
    assert found.pop("result.json") == b"three"
    assert sorted(found.values()) == [b"one", b"two"]
    assert all(name.startswith("result.json.bak-") for name in found)


@pytest.mark.parametrize("on_exists", ["timestamp", "skip", "replace"])
def test_racing_processes_lose_nothing(tmp_path: Path, on_exists: str) -> None:
    """Eight names, two processes: both results stand, or the first one alone where it is skip."""
    code = (
        "for i in range(8):\n"
        "    got = a.write_text(Path(sys.argv[1]) / f'{i}.txt', sys.argv[2], on_exists=sys.argv[3])"
        "\n    print(got and got.name)"
    )
    results = go(*(start(code, tmp_path, text, on_exists) for text in ("A", "B")))

    assert [rc for rc, _, _ in results] == [0, 0], results
    for i in range(8):
        texts = sorted(p.read_text() for p in tmp_path.iterdir() if p.name.startswith(f"{i}"))
        assert texts in (["A"], ["B"]) if on_exists == "skip" else texts == ["A", "B"]
    names = [out.split() for _, out, _ in results]
    if on_exists == "skip":
        assert all({a, b} == {f"{i}.txt", "None"} for i, (a, b) in enumerate(zip(*names)))  # noqa: B905
    if on_exists == "timestamp":
        assert all(a != b for a, b in zip(*names, strict=True))


def test_a_slow_replacement_loses_nothing(tmp_path: Path) -> None:
    """Both are between backup and rename at once, unless one waits for the other."""
    path = tmp_path / "result.txt"
    path.write_text("old")
    code = (
        "real = os.replace\n"
        "os.replace = lambda *names: (time.sleep(0.3), real(*names))\n"
        "a.write_text(Path(sys.argv[1]), sys.argv[2], on_exists='replace')"
    )
    results = go(*(start(code, path, text) for text in ("A", "B")))
    assert [rc for rc, _, _ in results] == [0, 0], results
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["A", "B", "old"]


@pytest.mark.parametrize("on_exists", ["timestamp", "skip", "replace"])
@pytest.mark.parametrize("call", ["link", "replace", "fsync"])
def test_sigkill_before_the_name_appears_leaves_the_old_bytes(
    tmp_path: Path, on_exists: str, call: str
) -> None:
    path = tmp_path / "result.json"
    if on_exists != "skip":
        path.write_text("old")
        os.utime(path, (1, 1))
    code = (
        f"os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "a.write_text(Path(sys.argv[1]), 'new' * 9999, on_exists=sys.argv[2])"
    )
    [(rc, _, errors)] = go(start(code, path, on_exists))

    reached = {"link": True, "replace": on_exists == "replace", "fsync": True}[call]
    assert rc == (-signal.SIGKILL if reached else 0), errors
    if on_exists == "skip":
        assert path.exists() != reached
    else:
        assert (path.read_text(), path.stat().st_mtime) == ("old", 1)
    visible = [p for p in tmp_path.iterdir() if not p.name.startswith(".tmp-")]
    for other in set(visible) - {path}:  # whole, whatever it is
        assert other.read_text() in ("old", "new" * 9999)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_results_are_as_protected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def link(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(artifacts.os, "link", link)
    path = tmp_path / "result.json"
    assert write_text(path, "one") == path
    assert write_text(path, "no", on_exists="skip") is None
    sibling = write_text(path, "two")
    assert sibling is not None and STAMPED.fullmatch(sibling.name)
    assert write_text(path, "three", on_exists="replace") == path
    [backup] = tmp_path.glob("*.bak-*")
    assert [p.read_text() for p in (path, sibling, backup)] == ["three", "two", "one"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_told_and_leaves_nothing(make_disk: MakeDisk) -> None:
    disk = make_disk(kb=64)
    path = disk / "result.json"
    write_text(path, "old")
    for on_exists in ("timestamp", "replace"):
        with pytest.raises(ProtectedPathError, match=r"cannot write .*result.json: No space left"):
            write_bytes(path, b"x" * 200_000, on_exists=on_exists)
        assert contents(disk) == {"result.json": b"old"}


def test_a_read_only_disk_is_told(make_disk: MakeDisk) -> None:
    disk = make_disk(read_only=True)
    for write in (
        lambda: write_text(disk / "a.txt", "x"),
        lambda: new_folder(disk / "run"),
        lambda: locked(disk / "run").__enter__(),
        lambda: JsonLines(disk / "a.jsonl").append({"kind": "stop"}),
        lambda: published_folder(disk / "store").__enter__(),
    ):
        with pytest.raises(ProtectedPathError, match=r"cannot write .*Read-only file system"):
            write()


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ProtectedPathError, match=r"cannot write .*file/result.json"):
        write_text(tmp_path / "file" / "result.json", "x")
    assert contents(tmp_path) == {"file": b"mine"}


def test_siblings_go_on_for_ever(tmp_path: Path) -> None:
    names = sibling_names(tmp_path / "plot.png", suffix=".png")
    first = [next(names).name for _ in range(4)]
    stamp = first[1].removeprefix("plot_").removesuffix(".png")
    assert first == ["plot.png", f"plot_{stamp}.png", f"plot_{stamp}-2.png", f"plot_{stamp}-3.png"]


def test_a_folder_with_a_dot_in_its_name_has_no_suffix(tmp_path: Path) -> None:
    made = [new_folder(tmp_path / "v0.1") for _ in range(3)]
    names = [folder.name for folder in made if folder]
    assert names[0] == "v0.1" and all(
        re.fullmatch(r"v0\.1_\d{8}-\d{6}(-\d)?", n) for n in names[1:]
    )


@pytest.mark.parametrize(("name", "suffix"), [("v0.1", ""), ("v0.1_report.md", ".md")])
def test_siblings_are_found_again_the_newest_first(tmp_path: Path, name: str, suffix: str) -> None:
    stem = name.removesuffix(suffix)
    made = [name, f"{stem}_20260101-000000-2{suffix}", f"{stem}_20250101-000000{suffix}"]
    others = [f"{stem}_2nd{suffix}", f"{name}.bak-20260101-000000-1", f"x{name}", f"v0_1{suffix}"]
    for age, other in enumerate((*made, *others)):
        (tmp_path / other).touch()
        os.utime(tmp_path / other, (1000 - age, 1000 - age))
    found = standing_siblings(tmp_path / name, suffix=suffix)
    assert [path.name for path in found] == made
    assert standing_siblings(tmp_path / "nowhere" / name) == []


# --- hashes -------------------------------------------------------------------------------------


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert sha256_json({"b": 1, "a": 2}) == sha256_json({"a": 2, "b": 1})
    expected = hashlib.sha256(b'{\n  "a": null\n}\n').hexdigest()
    assert sha256_json({"a": math.nan}) == expected
    assert to_json((1, 2)) == to_json([1, 2])


# --- folders ------------------------------------------------------------------------------------


def test_a_new_folder_is_private_and_never_shared(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    first, second = new_folder(run), new_folder(run)
    assert first == run
    assert second is not None and second.name.startswith("x_20")
    assert stat.S_IMODE(run.stat().st_mode) & 0o007 == 0  # nobody beyond the group
    assert new_folder(run, on_exists="skip") is None
    (run / "file").write_text("old")
    assert new_folder(run, on_exists="replace") == run
    assert not list(run.iterdir())
    [backup] = tmp_path.glob("runs/x.bak-*")
    assert (backup / "file").read_text() == "old"


@pytest.mark.parametrize("on_exists", ["timestamp", "replace"])
def test_racing_for_a_folder_ends_with_two(tmp_path: Path, on_exists: str) -> None:
    code = "print(a.new_folder(Path(sys.argv[1]), on_exists=sys.argv[2]))"
    (tmp_path / "run").mkdir()
    results = go(*(start(code, tmp_path / "run", on_exists) for _ in range(2)))
    assert [rc for rc, _, _ in results] == [0, 0], results
    made = {Path(out.strip()).name for _, out, _ in results} | {
        p.name for p in tmp_path.glob("run.bak-*")
    }
    assert len([p for p in tmp_path.iterdir()]) == 3  # the old one and two new ones
    assert made <= {p.name for p in tmp_path.iterdir()}


def test_a_published_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "store"
    with published_folder(target) as staging:
        assert staging.parent == target.parent and staging.name.startswith(".tmp-store-")
        (staging / "a").write_text("1")
        assert not target.exists()
    assert contents(target) == {"a": b"1"}
    assert [p.name for p in target.parent.iterdir()] == ["store"]
    with pytest.raises(ProtectedPathError, match="never overwritten"), published_folder(target):
        raise AssertionError("not reached")


def test_a_published_folder_is_removed_on_an_error(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), published_folder(tmp_path / "store") as staging:
            (staging / "a").write_text("1")
            raise error
        assert not list(tmp_path.iterdir())


def test_a_published_folder_loses_a_race_cleanly(tmp_path: Path) -> None:
    target = tmp_path / "store"
    with pytest.raises(ProtectedPathError), published_folder(target) as staging:
        (staging / "a").write_text("late")
        target.mkdir()
        (target / "a").write_text("early")
    assert contents(target) == {"a": b"early"}
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store"
    target.mkdir()
    (target / "a").write_text("old")

    with pytest.raises(ValueError), published_folder(target, replace=True) as staging:
        (staging / "a").write_text("new")
        raise ValueError
    assert [p.name for p in tmp_path.iterdir()] == ["store"]

    rename = os.rename

    def refuse(source: Path, name: Path) -> None:
        if source.name.startswith(".tmp-"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, name)

    monkeypatch.setattr(artifacts.os, "rename", refuse)
    with pytest.raises(ProtectedPathError), published_folder(target, replace=True) as staging:
        (staging / "a").write_text("new")
    assert contents(target) == {"a": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    monkeypatch.undo()

    with published_folder(target, replace=True) as staging:
        (staging / "a").write_text("new")
    assert contents(target) == {"a": b"new"}
    [backup] = tmp_path.glob("store.bak-*")
    assert contents(backup) == {"a": b"old"}


def test_a_file_that_cannot_be_read_is_not_told_as_a_full_disk(tmp_path: Path) -> None:
    """The block that fills a folder reads data too."""
    with pytest.raises(ProtectedPathError) as told, published_folder(tmp_path / "store"):
        raise OSError(errno.EIO, "Input/output error", "/data/texts.jsonl")
    assert "/data/texts.jsonl" in str(told.value)
    assert "free space" not in str(told.value)
    with (
        pytest.raises(ProtectedPathError, match="No space left on device; free space or"),
        published_folder(tmp_path / "store"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_killed_publication_is_invisible(tmp_path: Path) -> None:
    code = (
        "with a.published_folder(Path(sys.argv[1])) as s:\n"
        "    (s / 'a').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    go(start(code, tmp_path / "store"))
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".tmp-store-")
    with published_folder(tmp_path / "store") as staging:  # the next one is not in its way
        (staging / "a").write_text("2")
    assert contents(tmp_path / "store") == {"a": b"2"}


def test_two_processes_with_one_pid_do_not_share_a_staging_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two machines that share a disk (or in two containers) a process id is nobody's own."""
    monkeypatch.setattr(artifacts.os, "getpid", lambda: 7)
    with published_folder(tmp_path / "x") as one:
        (one / "a").write_text("one")
        with (
            pytest.raises(ZeroDivisionError),
            published_folder(tmp_path / "x") as two,
        ):
            assert one != two
            raise ZeroDivisionError
    assert contents(tmp_path / "x") == {"a": b"one"}


def test_back_up_moves(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    assert back_up(tmp_path / "f").name.startswith("f.bak-")
    assert not (tmp_path / "f").exists()


# --- the lock of a run folder -------------------------------------------------------------------

HOLD = "with f.locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = start(HOLD, folder)
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write("go\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "held\n"

    begin = time.monotonic()
    with pytest.raises(ConfigError, match=rf"in use by another run \(pid {holder.pid} on \S+\)"):
        locked(folder).__enter__()
    assert time.monotonic() - begin < 5

    holder.kill()  # nothing of it is left to clean up
    holder.communicate()
    with locked(folder):
        assert f"pid {os.getpid()} " in (folder / ".lock").read_text()
    with locked(folder):  # released on leaving
        pass


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", flock)
    with caplog.at_level(logging.WARNING, logger="modern_llm"):
        for step in (1, 2):
            with locked(tmp_path):
                assert JsonLines(tmp_path / "m.jsonl").append({"kind": "train", "step": step})
        write_text(tmp_path / "a", "1")
        write_text(tmp_path / "a", "2", on_exists="replace")
    assert caplog.text.count("its file system has no locks") == 1
    assert [row["step"] for row in rows(tmp_path / "m.jsonl")] == [1, 2]


def test_who_only_reads_a_log_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses an exclusive lock of a file that is open for reading alone."""
    path = tmp_path / "m.jsonl"
    JsonLines(path).append({"kind": "train", "step": 3})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tr')

    def flock(*_: Any) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", flock)
    log = JsonLines(path, writes=False)
    assert log.has("train", 3)
    assert not log.append({"kind": "train", "step": 4})
    assert log.has("train", 4)
    assert path.read_bytes() == whole + b'{"kind": "tr'


# --- logs ---------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_appends_and_drops_steps_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a" / "metrics.jsonl"
    log = JsonLines(path)
    assert log.append({"kind": "start", "step": 0})
    assert all(log.append({"kind": "train", "step": s, "loss": math.nan}) for s in (1, 2, 3))
    assert log.append({"kind": "eval", "step": 2})

    again = JsonLines(path)  # a restart from step 1: steps 2 and 3 are computed again
    assert again.append({"kind": "start", "step": 1})
    assert [again.append({"kind": "train", "step": s}) for s in (2, 3, 4)] == [False, False, True]
    assert [again.append({"kind": "eval", "step": s}) for s in (2, 4)] == [False, True]
    assert again.append({"kind": "stop", "step": 4}) and again.append({"kind": "stop", "step": 4})

    trained = [row["step"] for row in rows(path) if row["kind"] == "train"]
    assert trained == [1, 2, 3, 4]
    assert rows(path)[1]["loss"] is None  # valid JSON


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 3}', "\0\0"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "m.jsonl"
    whole = '{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n'
    path.write_text(whole + torn)
    log = JsonLines(path)
    assert path.read_text() == whole
    assert not log.append({"kind": "train", "step": 2})
    assert log.append({"kind": "train", "step": 3})
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "3", '"text"'])
def test_an_altered_log_is_refused_and_kept(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"kind": "stop"}}\n{line}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: not a JSON object"):
        JsonLines(path)
    assert path.read_text() == f'{{"kind": "stop"}}\n{line}\n'


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = (
        "log = a.JsonLines(Path(sys.argv[1]))\n"
        "for i in range(60): log.append({'kind': 'score', 'who': sys.argv[2], 'i': i, "
        "'text': 'x' * 9000})"
    )
    results = go(*(start(code, path, who) for who in "AB"))
    assert [rc for rc, _, _ in results] == [0, 0], results
    found = rows(path)
    for who in "AB":
        assert [row["i"] for row in found if row["who"] == who] == list(range(60))


def test_a_log_on_a_full_disk_is_told(make_disk: MakeDisk) -> None:
    log = JsonLines(make_disk(kb=16) / "m.jsonl")
    log.append({"kind": "train", "step": 1})
    with pytest.raises(ProtectedPathError, match="No space left"):
        log.append({"kind": "train", "step": 2, "text": "x" * 100_000})
    again = JsonLines(log.path)  # what was torn is repaired, what stood stands
    assert not again.append({"kind": "train", "step": 1})
    assert rows(log.path) == [{"kind": "train", "step": 1}]


# --- room ---------------------------------------------------------------------------------------

QUOTA = """Disk quotas for user somebody (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
/dev/sda1          {used}       0  {limit}       0       7       0       0       0
"""


@pytest.mark.parametrize(
    ("used", "limit", "left"),
    [("900", "1000", 100 * 1024), ("1200*", "1000", 0), ("900", "0", None), ("none", "", None)],
)
def test_room_is_that_of_disk_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: str, limit: str, left: int | None
) -> None:
    program = tmp_path / "quota"
    told = QUOTA.format(used=used, limit=limit)
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{told}END\n")
    program.chmod(0o755)
    disk = shutil.disk_usage(tmp_path).free
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert free_bytes(tmp_path) == pytest.approx(disk if left is None else left, rel=0.1)
    program.write_text("#!/bin/sh\nexit 1\n")
    assert free_bytes(tmp_path) == pytest.approx(disk, rel=0.1)

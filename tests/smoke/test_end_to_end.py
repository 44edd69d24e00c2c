"""The main command as a user types it: every stage, no network, an empty cache, then its report."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.cli import main
from modern_llm.runtime.artifacts import sha256_file

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-7f3a91"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def without_network() -> list[str]:
    """What to put before a command so that it has no network, where that can be done."""
    command = ["unshare", "-n"]
    if os.geteuid() == 0 and shutil.which("unshare"):
        able = subprocess.run([*command, "true"], capture_output=True, check=False)
        return command if able.returncode == 0 else []
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    """Where everything of the run lies: ``out`` has what it wrote."""
    base = tmp_path_factory.mktemp("smoke")
    config = write_tiny(base)
    prefix = without_network()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODERN_LLM"))}
    env |= {"HF_HOME": str(base / "hf"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env |= {name: CANARY for name in SECRETS}
    env |= {} if prefix else {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*prefix, sys.executable, str(ROOT / "scripts" / "run_pipeline.py"), "--config",
         str(config), "--stage", "all", "--output-dir", str(base / "out"), "--no-overwrite"],
        cwd=base, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    (base / "said.txt").write_text(done.stdout + done.stderr)
    return base


def report_of(folder: Path) -> Path:
    return folder / "out" / "report" / "tiny_report.md"


def test_all_stages_are_finished_and_reported(folder: Path) -> None:
    run = folder / "out" / "tiny"
    for stage in ("pretrain", "sft", "dpo", "verifier", "eval"):
        assert (run / stage / "result.json").is_file()
    text = report_of(folder).read_text()
    assert "Finished: pretrain, sft, dpo, verifier, eval." in text
    assert "are missing or damaged" not in text
    said = (folder / "said.txt").read_text()
    assert f"report: {report_of(folder)}" in said


def test_everything_is_below_the_output_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names <= {"tiny.json", "out", "cache", "hf", "said.txt", ".lock"}
    assert {path.name for path in (folder / "out").iterdir()} - {".lock"} == {
        "tiny", "report", "ledger.jsonl"
    }  # fmt: skip


def test_links_of_the_report_resolve(folder: Path) -> None:
    report = report_of(folder)
    text = report.read_text()
    links = LINK.findall(text)
    pictures = [link for link in links if link.endswith(".png")]
    assert len(pictures) >= 3
    for link in links:
        if link.startswith("#"):
            heads = {
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
                for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            }
            assert link[1:] in heads
        elif "://" not in link:
            assert (report.parent / link).exists(), link
    for picture in pictures:
        assert (report.parent / picture).read_bytes().startswith(b"\x89PNG")


def test_the_record_has_no_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder / "out" / "tiny")]) == 0
    assert "0 problems" in capsys.readouterr().out


def test_the_report_is_rebuilt_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert main(["report", str(folder / "out" / "tiny"), "--report-dir", str(tmp_path)]) == 0
    before = report_of(folder).parent
    files = {p.relative_to(before) for p in before.rglob("*") if p.is_file() and p.name[0] != "."}
    assert files == {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    for name in files:
        assert sha256_file(before / name) == sha256_file(tmp_path / name), name


def test_no_secret_is_written(folder: Path) -> None:
    """What the environment holds is in no file of a run, nor in what it says."""
    looked = 0
    for path in folder.rglob("*"):
        if path.is_file():
            looked += 1
            assert CANARY.encode() not in path.read_bytes(), path
    assert looked > 50


def test_the_same_command_again_changes_nothing(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    before = {
        path: (sha256_file(path), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    arguments = ["--config", str(folder / "tiny.json"), "--output-dir", str(folder / "out")]
    assert main(["run", *arguments, "--no-overwrite"]) == 0
    after = {path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == set(before)
    for path, (digest, changed) in before.items():
        assert (sha256_file(path), path.stat().st_mtime_ns) == (digest, changed), path

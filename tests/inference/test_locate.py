"""A path to a stage or a run means its last good checkpoint, and which one is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modern_llm.errors import CheckpointError
from modern_llm.inference.locate import locate_checkpoint, plugins_of


@pytest.fixture
def run(tmp_path: Path, tiny_run: Any) -> Path:
    """A run of the test's own, in which checkpoints can be damaged."""
    return shutil.copytree(tiny_run.run, tmp_path / "tiny")


def damage(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_is_itself(run: Path) -> None:
    final = run / "sft" / "final"
    assert locate_checkpoint(final) == final
    damage(final)
    assert locate_checkpoint(final) == final  # what is named is taken or refused, never replaced


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "verifier"])
def test_a_stage_is_its_final(run: Path, stage: str) -> None:
    assert locate_checkpoint(run / stage) == run / stage / "final"


def test_a_run_is_the_last_policy_that_is_finished(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="modern_llm"):
        assert locate_checkpoint(run) == run / "dpo" / "final"
    assert f"{run}: taking dpo/final" in caplog.text
    assert locate_checkpoint(run, stages=("pretrain", "sft")) == run / "sft" / "final"
    shutil.rmtree(run / "dpo" / "final")  # as if it had been stopped
    assert locate_checkpoint(run) == run / "sft" / "final"


def test_without_a_final_the_newest_good_checkpoint_is_taken(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for stage in ("pretrain", "sft", "dpo"):
        shutil.rmtree(run / stage / "final")
    steps = sorted((run / "dpo" / "checkpoints").iterdir())
    assert len(steps) > 1
    assert locate_checkpoint(run) == steps[-1]
    damage(steps[-1])
    assert locate_checkpoint(run) == locate_checkpoint(run / "dpo") == steps[-2]
    assert f"passing over a damaged checkpoint: {steps[-1]}" in caplog.text


def test_a_damaged_final_is_passed_over_aloud(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(run / "dpo" / "final")
    assert locate_checkpoint(run) == run / "sft" / "final"
    assert f"passing over a damaged checkpoint: {run / 'dpo' / 'final'}" in caplog.text


def test_a_run_without_a_good_checkpoint_is_refused(run: Path) -> None:
    shutil.rmtree(run / "pretrain" / "final")
    for step in (run / "pretrain" / "checkpoints").iterdir():
        damage(step)
    with pytest.raises(CheckpointError, match="has no good checkpoint below"):
        locate_checkpoint(run / "pretrain")


def test_anything_else_is_left_to_its_reader(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert locate_checkpoint(path) == path
        assert plugins_of(path) == {}


def test_every_command_takes_a_run(
    tiny_run: Any, make_tiny: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    """A stage starts from the stage before it, also where the run has gone further."""
    from modern_llm.cli import main

    run = str(tiny_run.run)
    assert (
        main(["generate", "--checkpoint", run, "--device", "cpu", "--max-new-tokens", "2", "a"])
        == 0
    )
    assert main(["export", run, str(tmp_path / "exported")]) == 0
    own = ["--config", str(make_tiny())]
    for stage, parent in (("sft", "pretrain"), ("dpo", "sft"), ("verifier", "dpo")):
        command = ["run", *own, "--stage", stage, "--checkpoint", run, "--max-steps", "1"]
        assert main([*command, "--run-name", stage]) == 0
        record = json.loads((tmp_path / "runs" / stage / stage / "stage.json").read_text())
        assert record["parent"]["path"] == str(tiny_run.run / parent / "final")
    assert main(["compare", *own, "--checkpoints", run, str(tiny_run.run / "sft")]) == 0

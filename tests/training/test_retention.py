import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from modern_llm.errors import CheckpointError
from modern_llm.training import (
    best_checkpoint,
    list_checkpoints,
    newest_good,
    prune,
    verify_checkpoint,
    write_checkpoint,
)
from modern_llm.training.retention import set_aside_damaged, step_of, sweep


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    with caplog.at_level(logging.WARNING, logger="modern_llm"):
        yield lambda: caplog.text


def save(checkpoints: Path, step: int, loss: float | None = None) -> Path:
    target = checkpoints / f"step-{step:08d}"
    meta = {} if loss is None else {"validation": {"loss": loss}}
    weights = {"w": torch.full((4,), float(step))}
    write_checkpoint(target, weights=weights, meta=meta, tokenizer_json="{}", trainer_state={})
    return target


def steps(checkpoints: Path) -> list[int]:
    return [step_of(folder) for folder in list_checkpoints(checkpoints)]


def test_listing_is_by_step_and_passes_over_what_is_none(tmp_path: Path) -> None:
    for step in (100, 20, 100_000_000):
        save(tmp_path, step)
    (tmp_path / ".tmp-step-00000200-1").mkdir()
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-00000007").touch()
    (tmp_path / "step-00000300").symlink_to(tmp_path / "step-00000020")
    assert steps(tmp_path) == [20, 100, 100_000_000]
    assert list_checkpoints(tmp_path / "nothing") == []
    with pytest.raises(CheckpointError, match="not named step"):
        step_of(tmp_path / "step-3")


def test_newest_good_passes_over_damaged_ones_aloud(
    tmp_path: Path, warnings: Callable[[], str]
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "trainer.pt").unlink()
    with (tmp_path / "step-00000002" / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    assert newest_good(tmp_path) == tmp_path / "step-00000001"
    for part in ("step-00000003/trainer.pt is missing", "step-00000002/model.safetensors has 10"):
        assert part in warnings().replace("\n", "")
    assert newest_good(tmp_path / "nothing") is None


def test_damaged_ones_are_set_aside_not_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    set_aside_damaged(tmp_path, newest=tmp_path / "step-00000001")
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.glob("step-0000000[23].bak-*"))) == 2
    save(tmp_path, 2)  # its name is free again
    set_aside_damaged(tmp_path, newest=None)
    assert steps(tmp_path) == []


def test_prune_keeps_the_last_the_best_and_the_protected(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 2.0, 4: None, 5: 3.0, 6: 4.0}
    for step, loss in losses.items():
        save(tmp_path, step, loss)
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000002"
    removed = prune(tmp_path, keep_last=2, protect={tmp_path / "step-00000004"})
    assert [step_of(folder) for folder in removed] == [1, 3]
    assert steps(tmp_path) == [2, 4, 5, 6]
    assert [f for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_prune_never_takes_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert prune(tmp_path, keep_last=0) == []
    assert best_checkpoint(tmp_path) is None


def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, warnings: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    assert prune(tmp_path, keep_last=1) == []
    assert "could not remove" in warnings()
    assert steps(tmp_path) == [1, 2]


def test_sweep_removes_what_killed_processes_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002-99" / "x").mkdir(parents=True)
    (tmp_path / ".tmp-prune-step-00000000-99").mkdir()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


def test_one_loadable_checkpoint_stands_at_every_instant(tmp_path: Path) -> None:
    save(tmp_path, 1)
    samples, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            newest = list_checkpoints(tmp_path)[-1]
            try:
                verify_checkpoint(newest)
                samples.append(True)
            except CheckpointError:  # pruned between listing and reading: there is a newer one
                samples.append(list_checkpoints(tmp_path)[-1] != newest)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(2, 40):
        save(tmp_path, step)
        prune(tmp_path, keep_last=2)
    done.set()
    watcher.join()
    assert len(samples) >= 20
    assert all(samples)


def test_a_broken_description_does_not_count_as_best(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, loss=1.0)
    (folder / "config.json").write_text(json.dumps({"validation": 3}))
    assert best_checkpoint(tmp_path) is None

"""Which checkpoints of a run stand: finding the newest good one, the best one, and pruning."""

import json
import os
import re
import shutil
from collections.abc import Set
from pathlib import Path

from modern_llm.errors import CheckpointError
from modern_llm.runtime.artifacts import back_up
from modern_llm.runtime.logs import get_logger
from modern_llm.training.checkpoint import (
    META,
    DamagedCheckpointError,
    read_checkpoint,
    verify_checkpoint,
)

log = get_logger(__name__)
NAME = re.compile(r"step-(\d{8,})")


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint of ``step``."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder, by its name."""
    match = NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not named step-<number>")
    return int(match.group(1))


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, oldest first; links and staging folders are not among them."""
    if not checkpoints.is_dir():
        return []
    found = [
        path
        for path in checkpoints.iterdir()
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=step_of)


def newest_good(checkpoints: Path) -> Path | None:
    """The newest checkpoint of which every byte verifies; damaged ones are named aloud.

    Raises:
        CheckpointError: one cannot be read, or is of a newer format: it may be good, and going on
            from an older one would lose its steps.
    """
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            verify_checkpoint(folder)
        except DamagedCheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
        else:
            return folder
    return None


def to_go_on_from(checkpoints: Path, *, resume: bool) -> str | None:
    """Path of the checkpoint that a run goes on from, after what killed processes left is cleared.

    Raises:
        CheckpointError: there are checkpoints and ``resume`` is off, or see `newest_good`.
    """
    sweep(checkpoints)
    if not resume and list_checkpoints(checkpoints):
        raise CheckpointError(
            f"{checkpoints} has checkpoints; resume from them, or choose another output"
        )
    newest = newest_good(checkpoints)
    set_aside_damaged(checkpoints, newest=newest)
    return None if newest is None else str(newest)


def set_aside_damaged(checkpoints: Path, *, newest: Path | None) -> None:
    """Rename what is newer than the newest good checkpoint, so that its step can be saved again."""
    for folder in list_checkpoints(checkpoints):
        if newest is None or step_of(folder) > step_of(newest):
            log.warning("set aside as %s", back_up(folder).name)


def standing_final(final: Path, *, step: int) -> str | None:
    """Hash of the published weights if they are of ``step``; otherwise they are moved aside.

    Raises:
        CheckpointError: they cannot be read.
    """
    if not final.exists():
        return None
    try:
        standing = read_checkpoint(final)
        if standing.meta.get("step") == step:
            return standing.sha256
    except DamagedCheckpointError as error:
        log.warning("%s", error)
    log.warning("%s is of another step or damaged: moved to %s", final, back_up(final))
    return None


def sweep(checkpoints: Path) -> None:
    """Remove staging folders that killed processes left; call it with the run folder locked."""
    for path in checkpoints.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def validation_loss(folder: Path) -> float | None:
    """Validation loss at a checkpoint's step, or ``None`` when there was no evaluation."""
    try:
        loss = json.loads((folder / META).read_text())["validation"]["loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if loss is None else float(loss)


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; the earliest of equals."""
    losses = [(validation_loss(folder), folder) for folder in list_checkpoints(checkpoints)]
    rated = [(loss, folder) for loss, folder in losses if loss is not None]
    return min(rated, key=lambda pair: pair[0])[1] if rated else None


def prune(checkpoints: Path, *, keep_last: int, protect: Set[Path] = frozenset()) -> list[Path]:
    """Remove all but the last ``keep_last`` checkpoints, the best of them, and those protected.

    A checkpoint vanishes by one rename first, so a killed process leaves no half of it. What
    cannot be removed stays, with a warning.

    Returns:
        The folders that were removed.
    """
    folders = list_checkpoints(checkpoints)
    keep = {*folders[-max(1, keep_last) :], *protect, best_checkpoint(checkpoints)}
    removed = []
    for folder in folders:
        if folder in keep:
            continue
        doomed = folder.with_name(f".tmp-prune-{folder.name}-{os.getpid()}")
        try:
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("could not remove %s: %s", folder, error)
        else:
            removed.append(folder)
    return removed

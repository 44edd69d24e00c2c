"""Which checkpoint a path means: a checkpoint itself, or the last good one of a stage or a run."""

import json
from collections.abc import Sequence
from pathlib import Path

from modern_llm.config import TRAINED_STAGES
from modern_llm.errors import CheckpointError
from modern_llm.runtime.logs import get_logger
from modern_llm.training.checkpoint import MANIFEST, META, DamagedCheckpointError, verify_checkpoint
from modern_llm.training.retention import newest_good

log = get_logger(__name__)
POLICIES = tuple(stage for stage in TRAINED_STAGES if stage != "verifier")  # models that answer
PLACES = ("final", "checkpoints")  # of a stage


def locate_checkpoint(path: Path, *, stages: Sequence[str] = POLICIES) -> Path:
    """The checkpoint that ``path`` means; a choice is logged.

    A checkpoint is itself. In a stage's folder it is ``final``, else the newest good one of a stage
    that was stopped. In a run's folder it is that of the last of ``stages`` that is finished, or of
    the last one begun if none is. Damaged ones are passed over, and named. Any other path is
    returned as it is, for its reader to refuse.

    Args:
        path: folder of a checkpoint, a stage or a run.
        stages: those of a run that will do, in order.

    Raises:
        CheckpointError: a stage or run without a good checkpoint.
    """
    folders = [path] if _is_stage(path) else [path / s for s in stages if _is_stage(path / s)]
    if (path / MANIFEST).exists() or not folders:
        return path
    for find in (_good_final, lambda folder: newest_good(folder / "checkpoints")):
        for folder in reversed(folders):
            found = find(folder)
            if found is not None:
                log.info("%s: taking %s", path, found.relative_to(path))
                return found
    raise CheckpointError(
        f"{path} has no good checkpoint below {', '.join(map(str, folders))}; let the stage run "
        "up to its first one, or name a checkpoint"
    )


def plugins_of(checkpoint: Path) -> dict[str, str]:
    """File name -> sha256 of the plugins that it was made with; its reader tells what is wrong."""
    try:
        return dict(json.loads((checkpoint / META).read_text()).get("plugins", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _is_stage(folder: Path) -> bool:
    return any((folder / place).is_dir() for place in PLACES)


def _good_final(folder: Path) -> Path | None:
    """Weights of a finished stage, unless they are damaged."""
    final = folder / "final"
    if not final.is_dir():
        return None
    try:
        verify_checkpoint(final)
    except DamagedCheckpointError as error:
        log.warning("passing over a damaged checkpoint: %s", error)
        return None
    return final

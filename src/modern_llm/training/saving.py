"""Checkpoints that are written while training goes on.

What a checkpoint holds is copied, which is all that training waits for; one thread then writes,
hashes and publishes it. On several ranks rank 0 writes, and all learn at the same step whether it
could.
"""

import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.ranks import group
from modern_llm.training.checkpoint import check_finite, write_checkpoint
from modern_llm.training.retention import checkpoint_path, prune

log = get_logger(__name__)


class Saver:
    """Publishes the checkpoints of a stage, one at a time, and prunes the old ones.

    Args:
        checkpoints: folder of all of them.
        keep_last: see `prune`.

    Attributes:
        step: of the newest that was begun, or gone on from; -1: none.
        newest: the newest that is known to be good.
        resumed_from: the one that the run went on from.
        saved: called with a row about each that was published.
    """

    def __init__(self, checkpoints: Path, *, keep_last: int) -> None:
        self.checkpoints, self.keep_last = checkpoints, keep_last
        self.step = -1
        self.newest: Path | None = None
        self.resumed_from: Path | None = None
        self.saved: Callable[[dict[str, Any]], None] = lambda row: None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None
        self._facts: dict[str, Any] = {}  # of what is written
        self._protect: Set[Path] = frozenset()

    def resumed(self, checkpoint: Path, *, step: int) -> None:
        """Remember where the run goes on from."""
        self.newest = self.resumed_from = checkpoint
        self.step = step

    def start(
        self, step: int, contents: Mapping[str, Any], *, protect: Set[Path], begin: float
    ) -> None:
        """Begin to write; the one before must be finished.

        Args:
            step: finished optimizer steps.
            contents: see `write_checkpoint`; on rank 0 apart from what trains on.
            protect: what `prune` must leave.
            begin: when training stopped for it, of ``time.perf_counter``.

        Raises:
            DivergedError: a weight is not finite.
            PeerError: the same on the ranks beside the first.
        """
        self.step, self._protect = step, protect
        target = checkpoint_path(self.checkpoints, step)
        with group().leader_first():
            check_finite(contents["weights"], target)
        if group().leads:
            stopped_s = time.perf_counter() - begin
            self._facts = {"step": step, "name": target.name, "begin": begin, "stopped": stopped_s}
            self._writing = self._thread.submit(write_checkpoint, target, **contents)

    def check(self) -> None:
        """Tell of what is published by now, or could not be; all ranks call it at the same step.

        Raises:
            ModernLLMError: that of `write_checkpoint`, on rank 0.
            PeerError: the same on the others.
        """
        done = self._writing is not None and self._writing.done()
        if group().highest(int(done)):
            self.finish()

    def finish(self) -> None:
        """Wait until what was begun is published; all ranks call it at the same step.

        Raises:
            ModernLLMError: as in `check`.
        """
        with group().leader_first():
            if self._writing is not None:  # on rank 0
                writing, self._writing = self._writing, None
                self._published(writing.result())

    def _published(self, digest: str) -> None:
        facts = self._facts
        self.newest = checkpoint_path(self.checkpoints, facts["step"])
        seconds = {"seconds": time.perf_counter() - facts["begin"], "stopped_s": facts["stopped"]}
        row = {"step": facts["step"], "name": facts["name"], "sha256": digest}
        self.saved({**row, **{name: round(value, 3) for name, value in seconds.items()}})
        protect = {*self._protect, self.newest}
        if self.resumed_from is not None:
            protect.add(self.resumed_from)
        prune(self.checkpoints, keep_last=self.keep_last, protect=protect)

    def close(self) -> None:
        """Wait for what is being written; for an end that has an error of its own already."""
        self._thread.shutdown()
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                self._published(writing.result())
            except Exception as error:
                log.warning("the checkpoint of step %s is not saved: %s", self.step, error)

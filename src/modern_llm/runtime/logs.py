"""One console and one logger for the package; results go to standard output, the rest here."""

import importlib.util
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from modern_llm.errors import ConfigError

LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal
T = TypeVar("T")

console = Console(stderr=True, highlight=False)


class ConsoleHandler(logging.Handler):
    """One line a message, never wrapped (paths in it can be copied), above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; warnings and errors say so."""
        style = "yellow" if record.levelno >= logging.WARNING else None
        console.print(self.format(record), style=style, markup=False, soft_wrap=True)


def get_logger(name: str) -> logging.Logger:
    """Logger below ``modern_llm``; its messages appear on the console from INFO on."""
    root = logging.getLogger("modern_llm")
    if not root.handlers:
        handler = ConsoleHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)-7s %(message)s", "%X"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
    return root.getChild(name.removeprefix("modern_llm."))


def log_of_rank(path: Path, *, console_too: bool) -> None:
    """Write all messages of this rank to a file of its own, too or instead.

    Args:
        path: of the file; what is there stays.
        console_too: on one rank, or the console has everything as often as there are ranks.
    """
    root = get_logger(__name__).parent
    assert root is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)-7s %(message)s"))
    kept = [h for h in root.handlers if console_too and isinstance(h, ConsoleHandler)]
    root.handlers = [*kept, handler]


def counted(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` and tell how far they are: a bar on a terminal, else a line now and then.

    Args:
        items: of a loop that may take long.
        what: named on the console.
        total: how many there are, where that is known; a single one is not counted.
    """
    if total == 1:
        yield from items
    elif console.is_terminal:
        yield from track(items, what, total, console=console, transient=True)
    else:
        log, told = get_logger(__name__), time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                log.info("%s: %s", what, f"{done:,}" if total is None else f"{done:,} of {total:,}")


def check_trackers(names: Iterable[str]) -> None:
    """Refuse experiment trackers that are not installed.

    Raises:
        ConfigError: says which, and how to install them.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"training.trackers: {', '.join(missing)} not installed: pip install "
            f"{' '.join(missing)}, or leave out (metrics.jsonl has everything)"
        )


class Trackers:
    """Copies of scalars for TensorBoard, Weights & Biases and the like, through accelerate.

    Args:
        names: trackers of accelerate; none costs nothing.
        folder: where those that write files have them; an offline run of wandb too.
        run: name of the run there.

    Raises:
        ConfigError: one is not installed.
    """

    def __init__(self, names: Sequence[str], *, folder: Path, run: str) -> None:
        self._accelerator: Any = None
        if names:
            check_trackers(names)
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder)
            here = {"wandb": {"dir": str(folder)}} if "wandb" in names else {}
            self._accelerator.init_trackers(run, init_kwargs=here)

    def log(self, kind: str, row: Mapping[str, Any]) -> None:
        """Copy the numbers of a row that has a ``step``, each as ``kind/name``."""
        if self._accelerator is not None:
            numbers = {
                f"{kind}/{name}": value
                for name, value in row.items()
                if isinstance(value, int | float) and name != "step"
            }
            self._accelerator.log(numbers, step=row["step"])

    def close(self) -> None:
        """Write what is left."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()  # end_training would also leave the group of ranks
            self._accelerator = None

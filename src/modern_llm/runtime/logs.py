"""One console and one logger for the package; results go to standard output, the rest here."""

import logging

from rich.console import Console

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

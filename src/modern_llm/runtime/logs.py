"""One console and one logger for the package; results go to standard output, the rest here."""

import logging

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True, highlight=False)


def get_logger(name: str) -> logging.Logger:
    """Logger below ``modern_llm``; its messages appear on the console from INFO on."""
    root = logging.getLogger("modern_llm")
    if not root.handlers:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%H:%M:%S]")
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
    return root.getChild(name.removeprefix("modern_llm."))

"""The end of a run on the terminal: what each stage gained, in one table."""

import re
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from modern_llm.reporting.gains import HEADS, gains
from modern_llm.reporting.results import read_run
from modern_llm.reporting.section_run import status
from modern_llm.reporting.tables import duration, plain, short
from modern_llm.runtime.logs import console


def summary_table(run: Path) -> Table:
    """Gains of every stage as a table for the terminal; the stages' time and state below.

    Raises:
        DataError: ``run`` is no run folder.
    """
    read = read_run(run)
    states = []
    for stage in read.stages.values():
        spent = stage.training.seconds
        took = f" in {duration(spent)}, {short(stage.training.tokens)} tokens" if spent else ""
        states.append(f"{stage.name}: {status(stage)}{took}")
    states.append(f"eval: {read.evaluation.status}")
    table = Table(
        title=f"run {escape(read.name)}: what each stage gained",
        caption=escape("\n".join(states)),
        title_justify="left",
        caption_justify="left",
    )
    for head in HEADS:
        table.add_column(head, overflow="fold")
    for row in gains(read):
        table.add_row(*(escape(_brief(plain(cell))) for cell in row))
    return table


def _brief(cell: str) -> str:
    """A cell without its interval and count, which are in the report."""
    return re.sub(r" \[[^\]]*\]| \(n=[^)]*\)", "", cell)


def print_summary(run: Path) -> None:
    """Print `summary_table` to the console (standard error)."""
    console.print(summary_table(run))

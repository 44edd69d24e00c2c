"""Starts command lines of modern_llm as forked processes; see `forking`.

A request ``{"arguments": [...], "log": path}`` is one start, and the answer its process id.
``{"wait": pid}`` answers with its exit code, that of a process that a signal killed is negative.
"""

import os
import sys
from pathlib import Path
from typing import Any

from modern_llm import cli

sys.path.insert(0, str(Path(__file__).parents[1]))
from forking import fork, serve


def answer(request: dict[str, Any]) -> int:
    """Do what one line asks for."""
    if "wait" in request:
        return os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    return fork(lambda: cli.main(request["arguments"]), request["log"])


if __name__ == "__main__":
    serve(answer, ("alignment.pipeline", "reporting.report"))

"""Starts jobs of several ranks as forked processes; see `forking`.

A request ``{"job": name, "options": {}, "environ": {}, "log": path}`` forks one process that calls
that function of `jobs` and ends with the code that it returns; the answer is the process id.
``{"poll": pid}`` answers with its exit code, that of a process that a signal killed is negative, or
null while it runs.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it for ranks

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import jobs  # type: ignore[import-not-found]
from forking import fork, serve


def answer(request: dict[str, Any]) -> int | None:
    """Do what one line asks for."""
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def work() -> int | None:
        os.environ.update(request["environ"])
        code: int | None = getattr(jobs, request["job"])(**request["options"])
        return code

    return fork(work, request["log"])


if __name__ == "__main__":
    parts = ("alignment.pipeline", "reporting.report", "reporting.console", "training.engines")
    serve(answer, parts)

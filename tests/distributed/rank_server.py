"""Starts jobs of several ranks as forked processes, so that each start costs no imports.

Run as a program. Each line on standard input is one request. ``{"job": name, "options": {},
"environ": {}, "log": path}`` forks one process that calls that function of `jobs` and ends with
the code that it returns; the answer is the process id. ``{"poll": pid}`` answers with its exit
code, that of a process that a signal killed is negative, or null while it runs. This process
itself computes nothing with torch.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it for ranks

import torch
import torch._dynamo  # every optimizer imports it; here it is imported once

from modern_llm.training.throughput import cpu_peak_flops

sys.path.insert(0, str(Path(__file__).parent))
import jobs  # type: ignore[import-not-found]


def start(job: str, options: dict[str, Any], environ: dict[str, str], log: str) -> int:
    """Fork one process; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environ)
        code = getattr(jobs, job)(**options) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> int | None:
    """Do what one line asks for."""
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    return start(**request)


def main() -> None:
    """Serve until standard input ends."""
    for name in ("alignment.pipeline", "reporting.report", "reporting.console", "training.engines"):
        importlib.import_module(f"modern_llm.{name}")
    torch.set_num_threads(1)
    cpu_peak_flops("fp32", 1)  # measured once, before any fork
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

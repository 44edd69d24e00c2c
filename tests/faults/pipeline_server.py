"""Starts command lines of modern_llm as forked processes, so that each start costs no imports.

Run as a program. Each line on standard input is one start, ``{"arguments": [...], "log": path}``;
the answer is the process id. ``{"wait": pid}`` answers with its exit code, that of a process that
a signal killed is negative. This process itself computes nothing with torch but a warm-up on one
thread.
"""

import importlib
import json
import os
import sys
import traceback
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it; here it is imported once

from modern_llm import cli
from modern_llm.training.throughput import cpu_peak_flops


def start(arguments: list[str], log: str) -> int:
    """Fork a process that runs one command line; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> int:
    """Do what one line asks for."""
    if "wait" in request:
        return os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    return start(request["arguments"], request["log"])


def main() -> None:
    """Serve until standard input ends."""
    for name in ("modern_llm.alignment.pipeline", "modern_llm.reporting.report"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    cpu_peak_flops("fp32", 1)  # measured once, before any fork
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()

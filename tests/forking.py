"""A program that forks what it is asked for, so that each start costs no imports.

Each line on its standard input is one request in JSON, and each line of its output the answer. It
computes nothing with torch itself but a warm-up on one thread.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it; here it is imported once

from modern_llm.training.throughput import cpu_peak_flops


def fork(call: Callable[[], int | None], log: str) -> int:
    """Start a process that calls, says all in ``log``, and ends with what is returned; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = call() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(answer: Callable[[dict[str, Any]], Any], modules: Sequence[str]) -> None:
    """Answer requests until standard input ends.

    Args:
        answer: to one request.
        modules: of ``modern_llm``, imported once.
    """
    for name in modules:
        importlib.import_module(f"modern_llm.{name}")
    torch.set_num_threads(1)
    cpu_peak_flops("fp32", 1)  # measured once, before any fork
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)

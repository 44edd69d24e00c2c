"""Lets a parent process start and stop a contestant's training by groups of optimizer steps.

A contestant calls `Gate.pass_batch` for each batch that its training loop asks for. Before the
first batch of each group it writes ``ready`` and waits for a line, so the time between the parent's
line and the next ``ready`` is that of one whole group of steps, whatever the loop does around them.
"""

import os
import sys


class Gate:
    """Args: ``steps`` of one group; one batch is one optimizer step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.passed = steps, 0
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to stderr

    def pass_batch(self) -> None:
        """Let one batch through; waits at the start of a group, ends when the parent is gone."""
        if self.passed % self.steps == 0:
            print("ready", file=self.out, flush=True)
            if not sys.stdin.readline().startswith("go"):
                os._exit(0)
        self.passed += 1

"""Trains in child processes that are killed with SIGKILL, again and again, until a run is done.

Run as a program: imports once and computes nothing itself, so that each cycle is one cheap fork.
Prints one JSON object: kills by kind, what stood after each kill, and the end of the run.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it; here it is imported once

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.models import ModernDecoderLM
from modern_llm.training import (
    LMObjective,
    Trainer,
    checkpoint,
    list_checkpoints,
    newest_good,
    read_checkpoint,
    retention,
    saving,
    trainer,
)

STEPS = 60
POINTS = ("between files", "before rename", "after rename", "before prune", "inside prune", "log")


class SlowLoader:
    """Batches of a step; slow enough that a kill lands in the middle of things."""

    fingerprint = "slow"
    steps_per_epoch = 4

    def batches(self, step: int) -> list[TokenBatch]:
        time.sleep(0.002)
        rng = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 32, (4, 9), generator=rng)
        return [TokenBatch(t[:, :-1], t[:, 1:]) for t in tokens.split(2)]


def train(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    sizes = {"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 8}
    model = ModernDecoderLM(ModelConfig(**sizes, dropout=0.1))
    config = TrainingConfig(
        max_steps=STEPS, batch_size=4, micro_batch_size=2, seq_len=8, lr=3e-3, device="cpu",
        log_every=1, save_every=3, eval_every=6,
    )  # fmt: skip
    Trainer(
        model, LMObjective(), SlowLoader(), config, folder=folder, tokenizer_json="{}",
        checkpoint_meta={}, evaluate=lambda m: {"loss": float(m.embedding.weight.norm())},
    ).fit()  # fmt: skip


def die_at(call: Callable[..., Any], nth: int, *, after: bool = False) -> Callable[..., Any]:
    """``call``, but the ``nth`` call kills this process, before or after its work."""
    left = [nth]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        result = call(*args, **kwargs) if after or left[0] else None
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def arm(point: str, nth: int) -> None:
    """Make this process kill itself at a point inside a save."""
    if point == "between files":
        checkpoint.save_file = die_at(checkpoint.save_file, nth, after=True)
    elif point == "before rename":
        os.rename = die_at(os.rename, nth)
    elif point == "after rename":
        os.rename = die_at(os.rename, nth, after=True)
    elif point == "before prune":
        saving.prune = die_at(saving.prune, nth)
    elif point == "inside prune":
        retention.shutil.rmtree = die_at(retention.shutil.rmtree, 3 * nth)
    elif point == "log":
        trainer.RunLog.saved = die_at(trainer.RunLog.saved, nth)


def start(folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a child that trains; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            prepare()
            train(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def summary(folder: Path) -> dict[str, Any]:
    """Hash of the final weights, and the rows of the log without what the clock decides."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_checkpoint(folder / "final").weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    timing = {"tokens_per_s", "tflops", "mfu", "step_s", "time_s", "memory_gb", "memory_peak_gb"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in row.items() if k not in timing}
        for row in rows
        if row["kind"] in ("train", "eval")
    ]
    return {
        "weights": digest.hexdigest(),
        "rows": kept,
        "starts": sum(row["kind"] == "start" for row in rows),
        "checkpoints": [f.name for f in list_checkpoints(folder / "checkpoints")],
        "left": [f.name for f in (folder / "checkpoints").glob(".tmp-*")],
    }


def one_kill(folder: Path, count: int, draw: random.Random, duration: float) -> str | None:
    """Start a child and kill it; the kind of kill, or ``None`` when it finished first."""
    point = POINTS[count // 2 % len(POINTS)] if count % 2 else "any moment"
    nth = draw.randint(1, 2)
    if point == "any moment":
        child = start(folder)
        time.sleep(draw.uniform(0.0, 0.5) * duration)
        os.kill(child, signal.SIGKILL)
    else:
        child = start(folder, lambda: arm(point, nth))
    return point if os.WIFSIGNALED(os.waitpid(child, 0)[1]) else None


def main(base: Path, kills: int, seed: int) -> dict[str, Any]:
    """Undisturbed once, then killed runs one after the other until ``kills`` kills are done."""
    draw = random.Random(seed)
    begin = time.perf_counter()
    assert os.waitpid(start(base / "whole"), 0)[1] == 0
    duration = time.perf_counter() - begin

    done: list[str] = []
    runs: list[dict[str, Any]] = []
    while len(done) < kills:
        folder, newest = base / f"killed-{len(runs)}", 0
        while len(done) < kills and (point := one_kill(folder, len(done), draw, duration)):
            done.append(point)
            good = newest_good(folder / "checkpoints")
            step = 0 if good is None else retention.step_of(good)
            assert step >= newest, f"{point}: fell back from step {newest} to {step}"
            newest = step
        assert os.waitpid(start(folder), 0)[1] == 0
        runs.append(summary(folder))
    return {"kills": done, "whole": summary(base / "whole"), "runs": runs}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))

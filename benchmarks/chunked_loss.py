"""Time and memory of the head and its cross entropy, forward and backward: whole and in chunks.

    python benchmarks/chunked_loss.py --rounds 3

Each case of a round is a process of its own; cases take turns. ``whole`` is the loss of all logits
(``training.loss_chunk=0``), a number is the tokens of a chunk. Time is the median of the repeats of
a process; ratios to ``whole`` are medians over rounds. Memory is what one more step, which is not
timed, allocates at most on top of its inputs.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from modern_llm.models.loss import chunk_loss, chunked_loss_sum, token_loss_sum
from modern_llm.runtime.devices import (
    DTYPES,
    autocast,
    keep_freed_memory,
    resolve_device,
)

WHOLE = "whole"


def peak_allocated_gb(step: Callable[[], None], device: torch.device) -> float:
    """The most that ``step`` holds at once, in GB, without what stood before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(n_bytes for _, n_bytes in changes)) / 1e9


def measure(args: argparse.Namespace, precision: str, case: str) -> dict[str, float]:
    """Seconds of one forward and backward, and GB at the most."""
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = resolve_device(args.device, field="--device")
    torch.manual_seed(0)
    hidden_MD = torch.randn(args.tokens, args.width, device=device, requires_grad=True)
    weight_VD = torch.randn(args.vocab, args.width, device=device).mul_(0.02).requires_grad_()
    label_M = torch.randint(0, args.vocab, (args.tokens,), device=device)
    whole, of_chunk = token_loss_sum, chunk_loss
    if args.compile:
        whole, of_chunk = torch.compile(whole), torch.compile(of_chunk)

    def step() -> None:
        hidden_MD.grad = weight_VD.grad = None
        with autocast(device, precision):
            if case == WHOLE:
                loss_sum = whole(F.linear(hidden_MD, weight_VD), label_M)
            else:
                loss_sum = chunked_loss_sum(
                    hidden_MD, weight_VD, label_M,
                    chunk=int(case), dtype=DTYPES[precision], chunk_loss=of_chunk,
                )  # fmt: skip
        loss_sum.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    seconds = []
    for _ in range(1 + args.repeats):
        begin = clock()
        step()
        seconds.append(clock() - begin)
    hidden_MD.grad = weight_VD.grad = None
    peak_gb = peak_allocated_gb(step, device)
    return {"seconds": statistics.median(seconds[1:]), "peak_gb": peak_gb}


def in_a_process(arguments: list[str], precision: str, case: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--one", precision, case]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{precision} {case} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> list[dict]:
    """Medians of each case, and its ratio to ``whole`` round by round."""
    found = []
    for precision, case in dict.fromkeys((row["precision"], row["case"]) for row in rows):
        own = [row for row in rows if (row["precision"], row["case"]) == (precision, case)]
        whole = [row for row in rows if (row["precision"], row["case"]) == (precision, WHOLE)]
        ratios = [row["seconds"] / base["seconds"] for row, base in zip(own, whole, strict=True)]
        found.append(
            {
                "precision": precision,
                "case": case,
                "seconds": statistics.median(row["seconds"] for row in own),
                "ratio": statistics.median(ratios),
                "peak_gb": statistics.median(row["peak_gb"] for row in own),
            }
        )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="the losses, as training.compile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="timed in each process")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, which a busy machine changes less; with --threads 1",
    )
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--one", nargs=2, metavar=("PRECISION", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.one:
        print(json.dumps(measure(args, *args.one)))
        return
    rows = []
    for _ in range(args.rounds):
        for precision in args.precisions:
            for case in (WHOLE, *map(str, args.chunks)):
                found = in_a_process(sys.argv[1:], precision, case)
                rows.append({"precision": precision, "case": case, **found})
    found = table(rows)
    print(f"{args.tokens} tokens, vocabulary {args.vocab}, width {args.width}")
    print("precision  chunk     seconds   ratio   memory")
    for row in found:
        print(
            f"{row['precision']:9}  {row['case']:>6}  {row['seconds']:9.3f}  {row['ratio']:6.2f}"
            f"  {row['peak_gb']:5.2f} GB"
        )
    if args.json:
        args.json.write_text(json.dumps({"table": found, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

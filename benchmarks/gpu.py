"""What one GPU gives: speed and MFU of training, DPO and decoding, memory, agreement with the CPU.

    python benchmarks/gpu.py

Each part is a process of its own with a budget of seconds, all of them within eight minutes; a part
that fails or runs out of time is named in the table, and the rest goes on. The record, with card,
driver and versions, goes below ``experiments/results/gpu/`` and replaces nothing. ``--device cpu
--sizes tiny --no-compile`` runs the same code on any machine, which measures nothing of interest.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
SIZES = ("full", "tiny")
LIMIT_S = 480.0  # of all parts together
START_S = 10.0  # of a process: imports and the device's context, before a part's own clock runs
SMALL, FLAGSHIP = "gpt2-full", "tacc"  # 124 M and 251 M parameters
TOLERANCES = {  # largest relative difference of a loss
    "fp32 from cpu fp32": 1e-4,
    "fp32 chunked from fp32": 1e-5,
    "bf16 from fp32": 1e-2,
    "bf16 chunked from bf16": 1e-2,
    "bf16 compiled from bf16": 1e-2,
    "bf16 compiled, chunked from bf16": 1e-2,
}


@dataclass(frozen=True)
class Part:
    """One measurement: its name in the table, what to run, and its share of the eight minutes."""

    name: str
    kind: str
    preset: str
    budget_s: float
    flags: tuple[str, ...] = ()


PARTS = (
    Part("agreement", "agreement", SMALL, 70),
    Part(f"train {SMALL}, whole loss", "train", SMALL, 75),
    Part(f"train {SMALL}, chunked loss", "train", SMALL, 75, ("--chunked",)),
    Part(f"train {FLAGSHIP}, whole loss", "train", FLAGSHIP, 75),
    Part(f"train {FLAGSHIP}, chunked loss", "train", FLAGSHIP, 75, ("--chunked",)),
    Part(f"dpo {FLAGSHIP}", "dpo", FLAGSHIP, 60),
    Part(f"decode {FLAGSHIP}", "decode", FLAGSHIP, 40),
)


def child(args: argparse.Namespace, kind: str, *flags: str, seconds: float) -> dict[str, Any]:
    """What ``kind`` measures in a process of its own, or ``{"failed": why}``.

    At the end of its time the process is killed, with those that compile for it.
    """
    command = [sys.executable, __file__, "--part", kind, "--device", args.device]
    command += ["--sizes", args.sizes, "--precision", args.precision, *flags]
    command += ["--no-compile"] if args.no_compile else []
    command += ["--budget-s", str(max(1.0, seconds - START_S))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"failed": f"not done within its {seconds:.0f} s"}
    if process.returncode:
        last = (err.strip() or "no message").splitlines()[-1]
        return {"failed": f"exit code {process.returncode}: {last}"}
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every part in turn, with its name and seconds."""
    begin = time.perf_counter()
    for part in PARTS:
        if args.only and part.kind not in args.only:
            continue
        now = time.perf_counter()
        seconds = min(part.budget_s, args.limit_s - (now - begin))
        if seconds < START_S:
            found: dict[str, Any] = {"failed": "no time was left"}
        else:
            found = child(args, part.kind, "--preset", part.preset, *part.flags, seconds=seconds)
        row = {"name": part.name, "kind": part.kind, **found}
        row["wall_s"] = time.perf_counter() - now
        print(line_of(row), flush=True)
        yield row


def line_of(row: dict[str, Any]) -> str:
    """A part as a line of the table."""
    head = f"{row['name']:30} {row['wall_s']:5.0f} s  "
    if "failed" in row:
        return head + f"FAILED: {row['failed']}"
    if row["kind"] == "agreement":
        return head + "; ".join(
            f"{name} {value:.1e}{'' if value <= TOLERANCES[name] else ' TOO FAR'}"
            for name, value in row["largest_relative_difference"].items()
        )
    if row["kind"] == "decode":
        return head + "; ".join(
            f"batch {speed['batch_size']}: {speed['decode_tokens_per_s']:,.0f} tokens/s"
            for speed in row["speeds"]
        )
    told = f"{row['tokens_per_s']:11,.0f} tokens/s"
    if row["kind"] == "dpo":
        told += (
            f"  {row['pairs_per_s']:,.1f} pairs/s of {row['tokens_per_pair']:.0f} tokens, "
            f"reference pass {row['reference_pairs_per_s']:,.1f}"
        )
    else:
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        told += (
            f"  {row['tflops_per_s']:7.2f} TFLOP/s  MFU {mfu}  "
            f"{row['params'] / 1e6:.0f} M parameters, "
            f"micro-batch {row['micro_batch_rows']} x {row['seq_len']}"
        )
    memory = f"peak {row['peak_memory_gb']:.1f} GB"
    return head + f"{told}  first step {row['first_step_s']:.1f} s  {memory}"


def all_is_well(rows: list[dict[str, Any]]) -> bool:
    """Every part was measured, and all losses agree."""
    far = [
        value > TOLERANCES[name]
        for row in rows
        for name, value in row.get("largest_relative_difference", {}).items()
    ]
    return not any(far) and not any("failed" in row for row in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", action="append", choices=sorted({p.kind for p in PARTS}))
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of all parts together")
    parser.add_argument("--results", type=Path, default=HERE.parent / "experiments/results/gpu")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--preset", default=SMALL, help=argparse.SUPPRESS)
    parser.add_argument("--chunked", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--budget-s", type=float, default=LIMIT_S, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """0: all was measured and agrees; 1: a part was not, or does not; 2: no such device."""
    args = parse()
    import torch

    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print(
            "error: no CUDA device here; on a machine without one, "
            "--device cpu --sizes tiny --no-compile tries the same code",
            file=sys.stderr,
        )
        return 2
    if args.part:
        from gpu_parts import run_part

        print(json.dumps(run_part(args)))
        return 0
    from modern_llm.runtime.artifacts import write_json
    from modern_llm.runtime.environment import environment

    facts = child(args, "card", seconds=60)
    print(f"{facts.get('name', facts)}, driver {facts.get('driver')}, torch {torch.__version__}")
    for kind, kernels in facts.get("attention_kernels", {}).items():
        print(f"attention, {kind}: {', '.join(kernels) or 'no fused kernel'}")
    rows = list(measured(args))
    record = {
        "format": 1,
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "card": facts,
        "sizes": args.sizes,
        "tolerances": TOLERANCES,
        "parts": rows,
        **environment(),
    }
    name = re.sub(r"[^a-z0-9]+", "-", str(facts.get("name", args.device)).lower()).strip("-")
    path = write_json(args.results / f"{name}.json", record)
    print(f"record: {path}")
    return 0 if all_is_well(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

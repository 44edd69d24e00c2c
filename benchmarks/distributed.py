"""Speed, scaling and memory of every engine, measured on ranks of this machine.

    python benchmarks/distributed.py                    two ranks on CPUs, some minutes
    torchrun --nproc-per-node=8 benchmarks/distributed.py --worker fsdp --device cuda ...   by hand

Every job is its own ``torchrun`` with one thread a rank; the jobs of a round take turns, and
medians over rounds are quoted. Each rank has as many rows a step whatever the number of ranks, so
the scaling efficiency is tokens a second over (ranks x tokens a second of one process). Memory of
a rank is by storage: of parameters, gradients and optimizer state after a step, and of what the
forward pass keeps for the backward. Theory: P parameters have 4 P bytes of weights, of gradients,
and 8 P of AdamW's moments; ddp divides none of them by the ranks, zero1 the moments, fsdp all.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES = ("none", "ddp", "zero1", "fsdp", "fsdp:grad_op")
PARTS = ("parameters", "gradients", "optimizer", "activations")


def sizes(text: str) -> dict[str, int]:
    """Model sizes of ``d_model,n_layers,n_heads,vocab,seq_len``."""
    names = ("d_model", "n_layers", "n_heads", "vocab_size", "max_seq_len")
    return dict(zip(names, map(int, text.split(",")), strict=True))


def component(engine: str) -> dict[str, str]:
    """``fsdp:grad_op`` as a config states it."""
    name, _, sharding = engine.partition(":")
    return {"name": name, "sharding": sharding} if sharding else {"name": name}


def local_bytes(tensors: Any) -> int:
    """Bytes of this rank's part of all tensors."""
    from torch.distributed.tensor import DTensor

    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in own)


def kept_bytes(model: Any, objective: Any, batch: Any, precision: str, device: Any) -> int:
    """Bytes that a forward pass keeps for the backward, without parameters; each storage once."""
    import torch

    from modern_llm.runtime.devices import autocast

    kept: dict[int, int] = {}
    weights: set[int] = set()  # where parameters lie while they compute, put together or not

    def see(module: Any, _: Any) -> None:
        weights.update(p.untyped_storage().data_ptr() for p in module.parameters(recurse=False))

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = [module.register_forward_pre_hook(see) for module in model.modules()]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(device, precision):
        terms = objective(model, batch)
    for hook in hooks:
        hook.remove()
    found = sum(size for place, size in kept.items() if place not in weights)
    terms.loss_sum.backward()  # leaves the engine as a step does
    model.zero_grad()
    return found


def worker(args: argparse.Namespace) -> None:
    """Train on one rank and write what it measured."""
    import torch

    from modern_llm.config import ModelConfig, TrainingConfig
    from modern_llm.config.schema import Component
    from modern_llm.data.collate import TokenBatch
    from modern_llm.models import ModernDecoderLM
    from modern_llm.runtime.devices import resolve_device
    from modern_llm.runtime.ranks import group, joined, launched_ranks
    from modern_llm.runtime.seeding import seed_everything
    from modern_llm.training import LMObjective
    from modern_llm.training.engines import ENGINES as KNOWN
    from modern_llm.training.update import Update

    torch.set_num_threads(1)
    model_config = ModelConfig(**sizes(args.sizes))
    named = component(args.worker)
    ranks = launched_ranks() if args.worker != "none" else launched_ranks({})
    with joined(ranks, timeout_s=300.0):
        world, rows = group().world_size, args.rows
        device = resolve_device(args.device)
        config = TrainingConfig(
            max_steps=args.steps + 1, batch_size=rows * world, micro_batch_size=rows,
            seq_len=model_config.max_seq_len, precision=args.precision,
            distributed=Component(**named),
        )  # fmt: skip
        engine = KNOWN.build(config.distributed, device, args.precision)
        seed_everything(0)

        def fill(model: Any) -> None:
            model.initialize_again()

        model = engine.build(lambda: ModernDecoderLM(model_config), fill)
        update = Update(model, LMObjective(), config, device=device, engine=engine)
        draw = torch.Generator().manual_seed(group().ranks.rank)
        shape = rows, model_config.max_seq_len + 1
        tokens = torch.randint(model_config.vocab_size, shape, generator=draw)
        batch = TokenBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        seconds = []
        gradients = 0
        update.optimizers.zero_grad = lambda: None  # type: ignore[method-assign]
        for step in range(args.steps + 1):
            begin = time.perf_counter()
            update([batch], step=step)
            seconds.append(time.perf_counter() - begin)
            gradients = local_bytes(p.grad for p in model.parameters() if p.grad is not None)
            model.zero_grad()
        inner = [getattr(part, "optim", part) for part in update.optimizers.parts]
        states = [t for part in inner for s in part.state.values() for t in s.values()]
        own = {
            "seconds": statistics.median(seconds[1:]),
            "tokens": batch.n_tokens,
            "parameters": local_bytes(model.parameters()),
            "gradients": gradients,
            "optimizer": local_bytes(t for t in states if t.ndim),
            "activations": kept_bytes(
                update.wrapped, LMObjective(), batch.to(device), args.precision, device
            ),
            "n_parameters": sum(p.numel() for p in model.parameters()),
        }
        rows_of_ranks = group().gather(list(own.values()))
        if group().leads:
            told = [dict(zip(own, values, strict=True)) for values in rows_of_ranks]
            Path(args.out).write_text(json.dumps(told))


def measure(args: argparse.Namespace, engine: str, n_ranks: int) -> list[dict[str, float]]:
    """What each rank of one job measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        own = ["--worker", engine, "--out", str(out), "--sizes", args.sizes]
        own += ["--rows", str(args.rows), "--steps", str(args.steps), "--device", args.device]
        command = [__file__, *own, "--precision", args.precision]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        done = subprocess.run(
            [sys.executable, *(launch if engine != "none" else []), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{engine} on {n_ranks} ranks failed:\n{done.stderr[-2000:]}")
        told: list[dict[str, float]] = json.loads(out.read_text())
        return told


def theory(engine: str, n_parameters: float, n_ranks: int) -> dict[str, float]:
    """Bytes of a rank by the formula; activations are not in it."""
    bytes_ = {"parameters": 4.0, "gradients": 4.0, "optimizer": 8.0}
    divided = {"none": (), "ddp": (), "zero1": ("optimizer",)}
    parts = divided.get(engine, tuple(bytes_))
    return {
        part: each * n_parameters / (n_ranks if part in parts else 1)
        for part, each in bytes_.items()
    }


def summary(rounds: list[list[dict[str, float]]], engine: str, alone: float) -> dict[str, Any]:
    """Medians over the rounds of one job, beside the theory."""
    n_ranks = len(rounds[0])
    speeds = [
        sum(rank["tokens"] for rank in ranks) / max(rank["seconds"] for rank in ranks)
        for ranks in rounds
    ]
    speed = statistics.median(speeds)
    largest = {part: max(rank[part] for rank in rounds[0]) for part in PARTS}
    formula = theory(engine, rounds[0][0]["n_parameters"], n_ranks)
    return {
        "engine": engine, "ranks": n_ranks, "tokens_per_s": speed, "all_rounds": speeds,
        "efficiency": speed / (n_ranks * alone) if alone else 1.0,
        "bytes_of_the_fullest_rank": largest, "theory": formula,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, sizes in MiB, the theory in brackets."""
    head = ["engine", "ranks", "tokens/s", "efficiency", *PARTS]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = [f"`{row['engine']}`", str(row["ranks"]), f"{row['tokens_per_s']:,.0f}"]
        cells.append(f"{row['efficiency']:.0%}")
        for part in PARTS:
            measured = f"{row['bytes_of_the_fullest_rank'][part] / 2**20:.1f}"
            known = row["theory"].get(part)
            cells.append(measured if known is None else f"{measured} [{known / 2**20:.1f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all jobs in turns, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured, after a first one")
    parser.add_argument("--rows", type=int, default=4, help="of a rank and step")
    parser.add_argument(
        "--sizes", default="384,6,6,4099,256", metavar="WIDTH,LAYERS,HEADS,VOCABULARY,CONTEXT"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    several = [(e, n) for n in args.ranks for e in args.engines if e != "none"]
    jobs = [("none", 1), *several]
    found: dict[tuple[str, int], list[list[dict[str, float]]]] = {job: [] for job in jobs}
    for turn in range(args.rounds):
        for job in jobs:
            found[job].append(measure(args, *job))
            print(f"round {turn + 1}: {job[0]} on {job[1]} ranks", file=sys.stderr)
    alone = summary(found["none", 1], "none", 0.0)["tokens_per_s"]
    rows = [summary(rounds, engine, alone) for (engine, _), rounds in found.items()]
    print(table(rows))
    if args.json:
        import torch

        machine = {"processor": platform.processor(), "cores": os.cpu_count()}
        options = {k: v for k, v in vars(args).items() if k not in ("json", "worker", "out")}
        record = {"options": options, "machine": machine, "torch": torch.__version__, "jobs": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

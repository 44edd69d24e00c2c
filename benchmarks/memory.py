"""Memory as `plan` predicts it, and as it is measured: parameters, gradients, moments, activations.

    python benchmarks/memory.py                     one process, then two ranks a engine
    python benchmarks/memory.py --only gpt2 --engines none
    python benchmarks/memory.py --json              the numbers alone, in bytes

Prints two markdown tables. Measured on the CPU, where the same formulas count the CPU's kernels:

- parameters, gradients, moments: bytes of their storages on the rank that has most;
- kept: storages that autograd saves in a forward pass (`saved_tensors_hooks`), parameters left out;
- peak: the most that the allocator gives out over a second micro-batch (torch's profiler).
"""

import argparse
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.models import ModernDecoderLM
from modern_llm.models.memory import Pass, activations
from modern_llm.runtime.ranks import joined, launched_ranks
from modern_llm.training.engines import ENGINES
from modern_llm.training.memory import Share, State
from modern_llm.training.objectives import token_loss_sum
from modern_llm.training.optim import build_optimizers

SIZES = dict(vocab_size=4000, d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, max_seq_len=256)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": dict(norm="layernorm", ffn="standard", position="learned", bias=True),
    "llama": dict(n_kv_heads=2, tie_embeddings=False),
    "moe": dict(n_kv_heads=2, moe={"n_experts": 4, "top_k": 2}),
    "window": dict(attention="window", window=64, qk_norm=True),
    "linear": dict(attention="linear"),
    "alibi": dict(position="alibi", norm="scalenorm", norm_position="post", ffn="relu2"),
    "bytes": dict(vocab_size=256, n_kv_heads=2),
    "dropout": dict(dropout=0.1, sink="learned", attention_backend="blocks"),
}
ENGINES_MEASURED = (
    ("ddp", ""), ("zero1", ""), ("fsdp", "full"), ("fsdp", "grad_op"),
)  # fmt: skip
ROWS = 4
ON_RANKS = ("gpt2", "moe", "bytes")  # measured under every engine
PARTS = ("parameters", "gradients", "optimizer", "kept", "peak")
Row = tuple[str, dict[str, float], dict[str, float]]  # what, predicted and measured bytes


def model_config(name: str) -> ModelConfig:
    return ModelConfig(**{**SIZES, **MODELS[name]})


def training_config(**options: Any) -> TrainingConfig:
    return TrainingConfig(max_steps=1, batch_size=ROWS, seq_len=SIZES["max_seq_len"], **options)


def storages(tensors: Iterator[Tensor]) -> int:
    """Bytes of all storages, each once."""
    found = {}
    for tensor in tensors:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = own.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def saved(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps after ``forward``, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def peak(call: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator has given out at once during ``call``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    changes: list[tuple[int, int]] = []

    def walk(events: Any) -> None:
        for event in events:
            if event.tag.name == "Allocation":
                changes.append((event.start_time_ns, event.typed[1].alloc_size))
            walk(event.children)

    walk(record.profiler.kineto_results.experimental_event_tree())
    now = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most


def measure(
    name: str, engine: str, sharding: str, precision: str, *, checkpointing: bool
) -> dict[str, float]:
    """Bytes of one rank by part; called on all ranks."""
    config, device = model_config(name), torch.device("cpu")
    named = {"name": engine, **({"sharding": sharding} if sharding else {})}
    training = training_config(precision=precision, distributed=named)
    torch.manual_seed(0)

    def make() -> nn.Module:
        return ModernDecoderLM(config)

    start = make().state_dict()
    built = ENGINES.build(training.distributed, device, precision)
    model = built.build(make, lambda empty: _fill(empty, start))
    model.set_activation_checkpointing(checkpointing)
    wrapped = built.wrap(model)
    optimizers = built.optimizers(build_optimizers(model, training))
    tokens_BT = torch.randint(0, config.vocab_size, (ROWS, training.seq_len))

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return token_loss_sum(wrapped(tokens_BT), tokens_BT)

    for _ in range(2):  # DDP puts its buckets in order at the second
        optimizers.zero_grad()
        forward().backward()
        optimizers.step()
    parameters = list(model.parameters())
    states = [s for part in optimizers.parts for s in _states(part)]
    found = {
        "parameters": float(storages(iter(parameters))),
        "gradients": float(storages(p.grad for p in parameters if p.grad is not None)),
        "optimizer": float(storages(x for s in states for x in s.values() if x.ndim)),
        "peak": float(peak(lambda: forward().backward())),
    }
    if engine == "none" and not checkpointing:  # a checkpoint keeps its arguments out of sight
        found["kept"] = float(saved(forward, model))
    return found


def _fill(empty: nn.Module, start: dict[str, Tensor]) -> None:
    empty.load_weights(start)  # type: ignore[operator]


def _states(part: Any) -> list[dict[str, Tensor]]:
    own = getattr(part, "optim", part)  # ZeRO-1 has its own inside
    return list(own.state.values())


def predict(name: str, share: Share, precision: str, *, checkpointing: bool) -> dict[str, float]:
    """The same parts by the plan's formulas, with the CPU's kernels."""
    config, number = model_config(name), 2 if precision == "bf16" else 4
    state = State(config, training_config(precision=precision))
    step = activations(config, Pass(ROWS, SIZES["max_seq_len"], number, on_gpu=False))
    copies = state.buffers(Share("none"), "loss", number=number, checkpointing=False)
    parts = state.footprint(share, step, number=number, checkpointing=checkpointing)
    return {
        "parameters": parts.parameters,
        "gradients": parts.gradients,
        "optimizer": parts.optimizer,
        "kept": step.kept() + copies,
        "peak": parts.activations + parts.loss + parts.buffers,
    }


def on_rank(rank: int, world: int, port: int, folder: str, cells: list[list[Any]]) -> None:
    """Measure all cells of several ranks; each rank leaves its numbers in ``folder``."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with joined(launched_ranks(), timeout_s=120):
        rows = [measure(*cell[:4], checkpointing=cell[4]) for cell in cells]
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))


def measure_ranks(world: int, cells: list[list[Any]]) -> list[dict[str, float]]:
    """For each cell the largest of all ranks, part by part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        mp.spawn(on_rank, (world, port, folder, cells), nprocs=world)
        ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world)]
    return [
        {part: max(r[part] for r in rows) for part in rows[0]} for rows in zip(*ranks, strict=True)
    ]


def table(title: str, rows: list[Row]) -> None:
    """Predicted and measured in MB, and how far apart, by part."""
    print(f"\n{title}: predicted / measured in MB\n")
    print(f"| what | {' | '.join(PARTS)} |\n|{' --- |' * (len(PARTS) + 1)}")
    for what, predicted, measured in rows:
        cells = []
        for part in PARTS:
            own, seen = predicted[part] / 1e6, measured.get(part, 0) / 1e6
            cells.append(f"{own:.2f} / {seen:.2f} ({own / seen - 1:+.1%})" if seen else "")
        print(f"| {what} | {' | '.join(cells)} |")


def one_process(names: list[str]) -> list[Row]:
    """Every model in both precisions, with checkpointing and without."""
    rows = []
    for name, precision, again in itertools.product(names, ("fp32", "bf16"), (False, True)):
        predicted = predict(name, Share("none"), precision, checkpointing=again)
        measured = measure(name, "none", "", precision, checkpointing=again)
        rows.append((f"{name}, {precision}{', checkpointing' * again}", predicted, measured))
    return rows


def several_ranks(names: list[str], world: int) -> list[Row]:
    """The same of every engine on ``world`` ranks."""
    cells = [
        [name, engine, sharding, precision, again]
        for name, (engine, sharding), precision, again in itertools.product(
            names, ENGINES_MEASURED, ("fp32", "bf16"), (False, True)
        )
    ]
    rows = []
    for (name, engine, sharding, precision, again), measured in zip(
        cells, measure_ranks(world, cells), strict=True
    ):
        share = Share(engine, sharding, world, world)
        predicted = predict(name, share, precision, checkpointing=again)
        what = f"{name}, {share}, {precision}{', checkpointing' * again}"
        rows.append((what, predicted, measured))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory predicted and measured.")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--engines", nargs="+", default=["none", "ranks"], choices=["none", "ranks"]
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    if "none" in args.engines:
        tables["One process"] = one_process(args.only)
    if "ranks" in args.engines:
        tables[f"{args.ranks} ranks"] = several_ranks(
            [n for n in args.only if n in ON_RANKS], args.ranks
        )
    if args.json:
        print(json.dumps(tables))
        return
    for title, rows in tables.items():
        table(title, rows)


if __name__ == "__main__":
    main()

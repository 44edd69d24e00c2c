"""The parts of ``gpu.py``: each measures one thing through the package's stages and Trainer."""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_data import SIZES, RandomPairs, RandomText, Sizes

from modern_llm.config import PipelineConfig, load_config
from modern_llm.evaluation.speed import measure_speed
from modern_llm.models.weights import model_weights
from modern_llm.runtime.devices import hardware, memory_gb, peak_memory_gb, resolve_device
from modern_llm.training.checkpoint import write_checkpoint
from modern_llm.training.throughput import Work, device_peak, mfu
from modern_llm.training.trainer import Trainer

TEXT = {"name": "synthetic", "kind": "text", "rows": 100}  # for the tokenizer only
PROBE_ROWS = 4  # of the micro-batch whose memory is measured
USABLE = 0.92  # of the memory that is free at the start; the allocator needs the rest
MAX_ACCUMULATION = 4  # micro-batches of a measured step
AGREEMENT_STEPS = 5
DECODE_BATCHES = (1, 32)


@dataclass(frozen=True)
class Job:
    """What one part is to do, and until when."""

    preset: str
    device: torch.device
    precision: str
    compiled: bool
    sizes: Sizes
    folder: Path  # empty, for stores and a checkpoint
    deadline: float  # of time.perf_counter

    def config(self, *overrides: str) -> PipelineConfig:
        """The preset on this device, with random data."""
        own = [
            "tokenizer.name=char", f"pretrain.data=[{json.dumps(TEXT)}]",
            f"data.cache_dir={self.folder / 'cache'}",
        ]  # fmt: skip
        for stage in ("pretrain", "dpo"):
            own += [
                f"{stage}.training.{field}={value}"
                for field, value in (
                    ("device", self.device), ("precision", self.precision),
                    ("compile", str(self.compiled).lower()),
                )
            ]  # fmt: skip
        return load_config(self.preset, [*own, *self.sizes.overrides, *overrides])

    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.perf_counter()


def trainer_of(stage: Any, model: torch.nn.Module) -> Trainer:
    """The stage's Trainer, without what it does beside its steps."""
    return Trainer(
        model, stage.objective(), stage.loader(), stage.section.training,
        folder=stage.folder, tokenizer_json=stage.tokenizer.to_json(),
        checkpoint_meta=stage.checkpoint_meta(), first_loss=stage.first_loss(),
    )  # fmt: skip


def timed_steps(trainer: Trainer, job: Job) -> dict[str, Any]:
    """Seconds of the first step (it compiles), and the speed of those after one more.

    A step ends when its loss is known, so the device is waited for.
    """
    seconds: list[float] = []
    tokens = scored = units = 0
    while len(seconds) < 4 or (
        sum(seconds[2:]) < job.sizes.seconds and job.seconds_left() > 2 * seconds[-1]
    ):
        begin = time.perf_counter()
        stats = trainer.train_step(trainer.loader.batches(len(seconds)))
        seconds.append(time.perf_counter() - begin)
        if len(seconds) > 2:
            tokens, scored = tokens + stats.tokens, scored + stats.scored
            units += stats.units
    total = sum(seconds[2:])
    return {
        "first_step_s": seconds[0],
        "steps": len(seconds) - 2,
        "median_step_s": statistics.median(seconds[2:]),
        "seconds": total,
        "tokens": tokens,
        "scored": scored,
        "units": units,
        "tokens_per_s": tokens / total,
        "peak_memory_gb": peak_memory_gb(job.device),
    }


def fitting_rows(choices: Sequence[int], *, room_gb: float, row_gb: float) -> int:
    """The largest of ``choices`` whose rows fit into ``room_gb``; the smallest if none does."""
    fits = [rows for rows in choices if rows * row_gb <= room_gb]
    return max(fits, default=min(choices))


def free_gb(device: torch.device) -> float:
    """Memory that can be had now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return float(hardware(device)["memory_gb"] or 1.0)


def released(device: torch.device) -> None:
    """Forget what was compiled and free what nothing holds, as in a new process."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def pretraining(job: Job, rows: int, batch_size: int, chunk: int) -> tuple[Trainer, Work]:
    """The pretrain stage's Trainer at a micro-batch of ``rows``."""
    section = "pretrain.training"
    stage = RandomText(
        job.config(
            f"{section}.micro_batch_size={rows}", f"{section}.batch_size={batch_size}",
            f"{section}.loss_chunk={chunk}",
        ),
        job.folder, None,
    )  # fmt: skip
    model = stage.build_model()
    return trainer_of(stage, model), Work.of(stage.cost_of(model))


def memory_of_rows(job: Job, rows: int, chunk: int) -> tuple[float, float]:
    """GB that a step holds whatever its rows, and GB of each row, from a step of ``rows``."""
    trainer, _ = pretraining(job, rows, rows, chunk)
    trainer.train_step(trainer.loader.batches(0))  # makes the moments
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    gradients_gb = 4 * sum(p.numel() for p in trainer.model.parameters()) / 1e9
    fixed_gb = memory_gb(job.device) + gradients_gb
    trainer.train_step(trainer.loader.batches(1))
    return fixed_gb, max(peak_memory_gb(job.device) - fixed_gb, 1e-6) / rows


def train(job: Job, *, chunked: bool) -> dict[str, Any]:
    """Speed, MFU and memory of pretraining at the largest micro-batch that fits."""
    chunk = job.sizes.chunk if chunked else 0
    batch_size = job.config().pretrain.training.batch_size
    choices = [n for n in range(1, job.sizes.max_rows + 1) if batch_size % n == 0]
    room_gb = USABLE * free_gb(job.device)
    probe = max(n for n in choices if n <= PROBE_ROWS)
    fixed_gb, row_gb = memory_of_rows(job, probe, chunk)
    rows = fitting_rows(choices, room_gb=room_gb - fixed_gb, row_gb=row_gb)
    refused = []
    while True:
        released(job.device)
        step_rows = rows * min(MAX_ACCUMULATION, batch_size // rows)
        try:
            trainer, work = pretraining(job, rows, step_rows, chunk)
            found = timed_steps(trainer, job)
            break
        except torch.OutOfMemoryError:
            refused.append(rows)
            smaller = [n for n in choices if n < rows]
            if not smaller:
                raise
            rows = max(n for n in smaller if n <= max(rows // 2, min(smaller)))
            trainer = None
    peak = device_peak(job.device, job.precision)
    flops_per_s = work.flops(found["tokens"], found["scored"]) / found["seconds"]
    training = trainer.config
    return {
        "preset": job.preset,
        "params": sum(p.numel() for p in trainer.model.parameters()),
        "precision": job.precision,
        "compiled": job.compiled,
        "fused_adamw": all(g.get("fused") for g in trainer.update.optimizers.groups()),
        "seq_len": training.seq_len,
        "loss_chunk": training.loss_chunk,
        "micro_batch_rows": rows,
        "step_rows": step_rows,
        "did_not_fit_rows": refused,
        "predicted_gb": {"fixed": fixed_gb, "row": row_gb, "free": room_gb / USABLE},
        **found,
        "tflops_per_s": flops_per_s / 1e12,
        "peak": None if peak is None else asdict(peak),
        "mfu": mfu(flops_per_s, None if peak is None else peak.flops),
        "final_loss": trainer.progress.loss,
    }


def fresh_checkpoint(job: Job) -> Path:
    """An untrained model of the preset as a checkpoint, for the stages that start from one."""
    stage = RandomText(job.config(), job.folder, None)
    model, target = stage.build_model(), job.folder / "pretrain" / "final"
    write_checkpoint(
        target, weights=model_weights(model), meta=stage.checkpoint_meta() | {"step": 0},
        tokenizer_json=stage.tokenizer.to_json(), trainer_state=None,
    )  # fmt: skip
    return target


def dpo(job: Job) -> dict[str, Any]:
    """Pairs a second of DPO, and of the reference pass before it."""
    stage = RandomPairs(job.config(), job.folder, fresh_checkpoint(job))
    stage.n_pairs = job.sizes.n_pairs
    _ = stage.store
    begin = time.perf_counter()
    trainer = trainer_of(stage, stage.build_model())  # the objective asks for the reference
    reference_s = time.perf_counter() - begin
    found = timed_steps(trainer, job)
    return {
        "preset": job.preset,
        "precision": job.precision,
        "compiled": job.compiled,
        "micro_batch_rows": trainer.config.micro_batch_size,
        "step_rows": trainer.config.batch_size,
        "tokens_per_pair": found["tokens"] / found["units"],
        **found,
        "pairs_per_s": found["units"] / found["seconds"],
        "reference_pairs_per_s": len(stage.store) / reference_s,  # two loads of the model in it
    }


def decode(job: Job) -> dict[str, Any]:
    """Tokens a second of greedy generation with a cache."""
    model = RandomText(job.config(), job.folder, None).build_model()
    speeds = [
        asdict(
            measure_speed(
                model, batch_size=n, precision=job.precision, new_tokens=job.sizes.new_tokens,
                prompt_tokens=job.sizes.new_tokens,
                max_seconds=min(job.sizes.seconds, job.seconds_left() / len(DECODE_BATCHES)),
            )
        )
        for n in DECODE_BATCHES
    ]  # fmt: skip
    peak = peak_memory_gb(job.device)
    return {"preset": job.preset, "speeds": speeds, "peak_memory_gb": peak}


def agreement(job: Job) -> dict[str, Any]:
    """Losses of a few steps from one seed: CPU against the device, and precisions on the device."""
    vocab, width, layers, length = job.sizes.agreement
    shape = [
        f"model.vocab_size={vocab}", f"model.d_model={width}", f"model.n_layers={layers}",
        "model.n_heads=4", "model.n_kv_heads=2", f"model.max_seq_len={length}",
        "dpo.max_prompt_tokens=8", "dpo.max_answer_tokens=8", "pretrain.training.warmup=0",
        "pretrain.training.lr=3e-3",
        "pretrain.training.batch_size=8", "pretrain.training.micro_batch_size=4",
    ]  # fmt: skip
    cpu = replace(job, device=resolve_device("cpu"), precision="fp32", compiled=False)
    arms = {
        "cpu fp32": (cpu, 0),
        "fp32": (replace(cpu, device=job.device), 0),
        "fp32 chunked": (replace(cpu, device=job.device), length),
        "bf16": (replace(job, compiled=False), 0),
        "bf16 chunked": (replace(job, compiled=False), length),
    }
    if job.compiled:
        arms |= {"bf16 compiled": (job, 0), "bf16 compiled, chunked": (job, length)}
    curves: dict[str, list[float]] = {}
    for name, (arm, chunk) in arms.items():
        stage = RandomText(
            arm.config(*shape, f"pretrain.training.loss_chunk={chunk}"), arm.folder, None
        )
        trainer = trainer_of(stage, stage.build_model())
        batches = map(trainer.loader.batches, range(AGREEMENT_STEPS))
        curves[name] = [trainer.train_step(each).loss for each in batches]
    pairs = {"fp32": "cpu fp32", "fp32 chunked": "fp32", "bf16": "fp32", "bf16 chunked": "bf16"}
    pairs |= {name: "bf16" for name in arms if "compiled" in name}
    far = {
        f"{name} from {base}": max(
            abs(a / b - 1) for a, b in zip(curves[name], curves[base], strict=True)
        )
        for name, base in pairs.items()
    }
    return {"losses": curves, "largest_relative_difference": far}


def attention_kernels(device: torch.device) -> dict[str, list[str]]:
    """The fused kernels of torch that would take the attention of a bf16 step, by kind of call.

    None means that all logits stand in memory: grouped heads and a mask are a hard pair.
    """
    able = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }
    found = {}
    for grouped, masked in itertools.product((False, True), repeat=2):
        q, k = (
            torch.empty(1, heads, 1024, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
            for heads in (16, 4 if grouped else 16)
        )
        mask = q.new_zeros(1, 1, 1024, 1024) if masked else None
        call = torch.backends.cuda.SDPAParams(q, k, k, mask, 0.0, not masked, grouped)
        kind = f"{'masked' if masked else 'causal'}{', grouped heads' if grouped else ''}"
        found[kind] = [name for name, takes in able.items() if takes(call)]
    return found


def card(device: torch.device) -> dict[str, Any]:
    """What computes, with the driver."""
    facts: dict[str, Any] = {**hardware(device), "torch": torch.__version__}
    if device.type == "cuda":
        facts["attention_kernels"] = attention_kernels(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            told = ""
        facts |= {
            "driver": told.splitlines()[0].strip() if told.strip() else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "fp32_matmul_precision": torch.get_float32_matmul_precision(),
        }
    return facts


PARTS = {"agreement": agreement, "train": train, "dpo": dpo, "decode": decode, "card": card}


def run_part(args: argparse.Namespace) -> dict[str, Any]:
    """One part in this process, as ``gpu.py --part`` asks."""
    begin = time.perf_counter()
    device = resolve_device(args.device, field="--device")
    if args.part == "card":
        return card(device)
    with tempfile.TemporaryDirectory() as name:
        job = Job(
            args.preset, device, args.precision, not args.no_compile, SIZES[args.sizes],
            Path(name), begin + args.budget_s,
        )  # fmt: skip
        if args.part == "train":
            return train(job, chunked=args.chunked)
        return PARTS[args.part](job)

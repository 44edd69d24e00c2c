"""How time and memory of one attention layer grow with the text: full, window and linear.

    python benchmarks/attention_scaling.py              the table of the README
    python benchmarks/attention_scaling.py --demo       small, under a minute

A point is a kind of attention, a length T and a pass: ``forward``; ``training``, forward and
backward; ``decode``, one more token after T with the model's cache; ``stream``, the same with the
cache that keeps the window only. Each is measured in a process of its own, so that its peak of
memory is its own; the points of a round are shuffled, and medians over rounds are quoted.

The layer is a decoder of one layer with next to no feed-forward (8 columns) and no head: what is
measured is its projections, its masks and its attention. The exponent is the slope of a line
through the points in log-log: 1 is linear, 2 quadratic. FLOPs are those that
``torch.utils.flop_counter`` counts with plain products, which for full attention is all pairs of
tokens.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("full", "window", "linear")
PASSES = ("forward", "training", "decode", "stream")
DECODED = 24  # tokens that a decoding pass takes its median over
UNITS = {"seconds": ("ms", 1e3), "peak_bytes": ("MiB", 2.0**-20), "state_bytes": ("KiB", 2.0**-10)}
UNITS["flops"] = ("MFLOPs", 1e-6)
DEMO = {"lengths": [512, 2048], "window": 128, "d_model": 128, "n_heads": 2}
DEMO |= {"rounds": 1, "repeats": 1}


@dataclass(frozen=True)
class Point:
    """What one process measures, and how."""

    kind: str
    name: str  # of the pass
    length: int  # tokens (T)
    window: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    repeats: int
    threads: int
    device: str
    precision: str
    clock: str


# In the process of a point: torch is imported here only, so that the process above stays small.


def build(point: Point) -> Any:
    """The decoder of one layer."""
    import torch

    from modern_llm.config import ModelConfig
    from modern_llm.models import ModernDecoderLM

    config = ModelConfig(
        vocab_size=256,
        d_model=point.d_model,
        n_layers=1,
        n_heads=point.n_heads,
        n_kv_heads=point.n_kv_heads,
        d_ff=8,
        max_seq_len=point.length + DECODED,
        attention=point.kind,
        window=point.window if point.kind == "window" else None,
    )
    torch.manual_seed(0)
    return ModernDecoderLM(config)


def measure(point: Point) -> dict[str, float]:
    """Seconds, and peak bytes, or bytes of the cache after a decoding pass."""
    import torch

    torch.set_num_threads(point.threads)
    model = build(point).to(point.device)
    tokens = torch.randint(0, 256, (1, point.length), device=point.device)
    bfloat16 = point.precision == "bf16"
    with torch.autocast(point.device, torch.bfloat16, enabled=bfloat16):
        if point.name in ("decode", "stream"):
            return decoded(point, model, tokens)
        run = once(model, tokens, training=point.name == "training")
        once(model, tokens[:, :64], training=point.name == "training")()  # what is set up but once
        peak_bytes = peak_of(run, point.device)
        seconds = [timed(run, point) for _ in range(point.repeats)]
    return {"seconds": statistics.median(seconds), "peak_bytes": peak_bytes}


def once(model: Any, tokens: Any, *, training: bool) -> Callable[[], None]:
    """One pass over ``tokens``, to be called."""
    import torch

    def run() -> None:
        with torch.set_grad_enabled(training):
            hidden = model.hidden(tokens)
            if training:
                hidden.float().sum().backward()
                model.zero_grad()

    return run


def decoded(point: Point, model: Any, tokens: Any) -> dict[str, float]:
    """Seconds of one token after ``length`` of them (all fed), and bytes of the cache."""
    import torch

    from modern_llm.models.kv_cache import StateCache

    with torch.no_grad():
        if point.name == "stream":
            cache = model.new_streaming_cache()
            for at in range(point.length):
                model.hidden(tokens[:, at : at + 1], cache=cache)
        else:
            cache = model.new_cache(1, point.length + DECODED)
            model.hidden(tokens, cache=cache)
        run = lambda: model.hidden(tokens[:, :1], cache=cache)  # noqa: E731
        seconds = statistics.median(timed(run, point) for _ in range(DECODED))
    if isinstance(cache, StateCache):
        held = list(itertools.chain(*cache.states.values()))
    elif point.name == "stream":
        held = [*cache.k.values(), *cache.v.values()]
    else:
        held = [cache.k, cache.v]
    return {"seconds": seconds, "state_bytes": sum(x.numel() * x.element_size() for x in held)}


def timed(run: Callable[[], Any], point: Point) -> float:
    """Seconds on the wall clock, or of processor time."""
    import torch

    now = time.process_time if point.clock == "cpu" else time.perf_counter
    if point.device == "cuda":
        torch.cuda.synchronize()
    begin = now()
    run()
    if point.device == "cuda":
        torch.cuda.synchronize()
    return now() - begin


def peak_of(run: Callable[[], None], device: str) -> int:
    """Bytes that a first run takes at its peak beyond what was held before."""
    import torch

    from modern_llm.runtime.devices import peak_memory_gb

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    forget = Path("/proc/self/clear_refs")
    if forget.exists():  # Linux: the peak of what came before (imports) would hide a smaller one
        forget.write_text("5")
    before = peak_memory_gb(torch.device(device))
    run()
    return round((peak_memory_gb(torch.device(device)) - before) * 1e9)


def flops_of(point: Point) -> int:
    """FLOPs of the pass, counted on the meta device, where nothing is computed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build(point).to("meta")
    tokens = torch.zeros(1, point.length, dtype=torch.long, device="meta")
    run = once(model, tokens, training=point.name == "training")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()  # with plain products: the counter sees no others
    return counter.get_total_flops()


# In the process above.


def points(args: argparse.Namespace) -> list[Point]:
    """All that are asked for; only a window has a stream."""
    same = ("window", "d_model", "n_heads", "n_kv_heads", "repeats", "threads", "device")
    how = {name: getattr(args, name) for name in (*same, "precision", "clock")}
    return [
        Point(kind, name, length, **how)
        for name, kind, length in itertools.product(args.passes, args.kinds, args.lengths)
        if name != "stream" or kind == "window"
    ]


def take_turns(todo: list[Point], rounds: int) -> list[dict[str, Any]]:
    """Measure every point once a round, in another order each; medians over the rounds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modern_llm.models"])
    seen: dict[Point, list[dict[str, float]]] = {point: [] for point in todo}
    rng = random.Random(0)
    for number in range(rounds):
        for point in rng.sample(todo, len(todo)):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                seen[point].append(pool.submit(measure, point).result())
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for point, found in seen.items():
            row = {"kind": point.kind, "pass": point.name, "length": point.length}
            row |= {name: statistics.median(f[name] for f in found) for name in found[0]}
            if point.name in ("forward", "training"):
                row["flops"] = pool.submit(flops_of, point).result()
            rows.append(row)
    return rows


def exponent(lengths: list[int], values: list[float]) -> float | None:
    """Slope of log(value) over log(length), by least squares; None where a value is not above 0."""
    if len(lengths) < 2 or min(values) <= 0:
        return None
    x, y = ([math.log(n) for n in numbers] for numbers in (lengths, values))
    return statistics.linear_regression(x, y).slope


def curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured of each kind and pass as a curve over the lengths, with its exponent."""
    found = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pass"], row["kind"]), []).append(row)
    for measured in UNITS:
        for (name, kind), group in groups.items():
            group = sorted(group, key=lambda row: row["length"])
            if measured in group[0]:
                lengths, values = ([row[key] for row in group] for key in ("length", measured))
                curve = {"measured": measured, "pass": name, "kind": kind, "lengths": lengths}
                growth = [b / a if a else None for a, b in itertools.pairwise(values)]
                slope = exponent(lengths, values)
                found.append({**curve, "values": values, "growth": growth, "exponent": slope})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The curves as a table in markdown: values, growth from length to length, exponent."""
    lengths = found[0]["lengths"]
    steps = [f"{a} to {b}" for a, b in itertools.pairwise(lengths)]
    titles = ["measured", "kind", *(f"T={n}" for n in lengths), *steps, "exponent"]
    lines = [titles, ["---"] * len(titles)]
    for curve in found:
        unit, factor = UNITS[curve["measured"]]
        what = {"peak_bytes": "peak memory", "state_bytes": "cache", "flops": "FLOPs"}
        name = f"{curve['pass']} {what.get(curve['measured'], 'time')}, {unit}"
        values = [f"{factor * value:,.4g}" for value in curve["values"]]
        growth = ["-" if g is None else f"x {g:.2f}" for g in curve["growth"]]
        slope = "-" if curve["exponent"] is None else f"{curve['exponent']:.2f}"
        lines.append([name, curve["kind"], *values, *growth, slope])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(found: list[dict[str, Any]]) -> bytes:
    """PNG of time and memory over the length, both axes logarithmic."""
    from modern_llm.reporting.plots.canvas import COLOURS, render

    styles = dict(zip(KINDS, zip(COLOURS.values(), "o^s", strict=False), strict=True))
    panels = [
        ("training", "seconds", "forward and backward, ms"),
        ("training", "peak_bytes", "peak memory of it, MiB"),
        ("decode", "seconds", "one more token, ms"),
    ]

    def draw(canvas: Any) -> None:
        for axes, (name, measured, title) in zip(canvas.subplots(1, 3), panels, strict=True):
            for curve in found:
                if (curve["pass"], curve["measured"]) == (name, measured):
                    colour, marker = styles[curve["kind"]]
                    values = [UNITS[measured][1] * value for value in curve["values"]]
                    slope = curve["exponent"]
                    label = curve["kind"] + ("" if slope is None else f": T^{slope:.2f}")
                    axes.plot(curve["lengths"], values, marker=marker, color=colour, label=label)
            axes.set(xscale="log", yscale="log", xlabel="tokens (T)", title=title)
            axes.set_xticks(found[0]["lengths"], [str(n) for n in found[0]["lengths"]])
            axes.set_xticks([], minor=True)
            axes.legend()

    return render(draw, 11, 3.4)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--window", type=int, default=256, help="keys that a query sees")
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--n-heads", type=int, default=6)
    parser.add_argument("--n-kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="runs of a point in its process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, which a busy machine changes less; with --threads 1",
    )
    parser.add_argument("--demo", action="store_true", help="small sizes, one round")
    parser.add_argument("--json", type=Path, help="also write rows and curves here")
    parser.add_argument("--plot", type=Path, help="also write a figure here (PNG)")
    given = parser.parse_args()
    if given.demo:  # what is named beside it stands
        parser.set_defaults(**DEMO)
        given = parser.parse_args()
    given.n_kv_heads = given.n_kv_heads or given.n_heads
    given.lengths = sorted(set(given.lengths))
    if given.clock == "cpu" and (given.threads > 1 or given.device == "cuda"):
        parser.error("--clock cpu adds up all threads and knows no GPU: use --threads 1 on a CPU")
    return given


def versions() -> dict[str, str]:
    """Machine and versions."""
    import importlib.metadata

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    installed = importlib.metadata.version("torch")
    return {"cpu": model, "python": platform.python_version(), "torch": installed}


def main() -> None:
    args = parse()
    rows = take_turns(points(args), args.rounds)
    found = curves(rows)
    print(table(found))
    if args.json:
        named = {key: value for key, value in vars(args).items() if key not in ("json", "plot")}
        record = {"options": named, "versions": versions(), "rows": rows, "curves": found}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if args.plot:
        args.plot.write_bytes(figure(found))


if __name__ == "__main__":
    main()

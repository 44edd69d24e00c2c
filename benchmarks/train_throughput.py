"""Training speed of a 10 M parameter model against its peers, interleaved, as ratios.

    python benchmarks/train_throughput.py --litgpt-python PATH/TO/OTHER/VENV/bin/python

Each contestant is a process that trains the same sizes on the same tokens with its own training
loop. All are started and warmed up (compiled), then they take turns: one group of optimizer steps
each a round, the others asleep. A round gives one ratio a peer, and the median over rounds is
quoted: a busy machine slows all contestants of a round alike. litgpt is no dependency of this
project; install it in a virtual environment of its own (``pip install litgpt``).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.config import PipelineConfig, load_config

HERE = Path(__file__).resolve().parent
OURS = "modern_llm"
PEERS = {  # name -> script, variant
    "transformers Trainer": ("transformers_trainer.py", "sdpa"),
    "litgpt bf16-mixed": ("litgpt_pretrain.py", "bf16-mixed"),
    "litgpt bf16-true": ("litgpt_pretrain.py", "bf16-true"),
}
sys.path.insert(0, str(HERE / "contestants"))
from sizes import Sizes  # noqa: E402


@dataclass
class Contestant:
    """A training process behind its gate, and the seconds of each of its groups."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    seconds: list[float]

    def wait_ready(self) -> None:
        """Wait until the process asks for the first batch of its next group.

        Raises:
            RuntimeError: it ended; shows the last lines of its log.
        """
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            self.process.wait()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{tail}")

    def run_group(self, *, clock: str = "wall") -> float:
        """Train one group of steps; seconds on the wall clock or of processor time."""
        assert self.process.stdin is not None
        begin = self._now(clock)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.wait_ready()
        return self._now(clock) - begin

    def _now(self, clock: str) -> float:
        if clock == "wall":
            return time.perf_counter()
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def write_tokens(config: PipelineConfig, path: Path) -> None:
    """Save the training tokens of the config, for the peers."""
    stage = PretrainStage(config, path.parent, None)
    np.save(path, np.concatenate([np.asarray(store.tokens) for store in stage.stores]))


def sizes_of(config: PipelineConfig, args: argparse.Namespace, tokens: Path) -> Sizes:
    model, training = config.model, config.pretrain.training
    if training.optimizer.name != "adamw" or training.eval_every:
        raise SystemExit(
            f"{args.config}: the peers train with AdamW and without validation; set "
            "pretrain.training.optimizer=adamw and pretrain.training.eval_every=0"
        )
    return Sizes(
        config=str(args.config),
        tokens=str(tokens),
        variant="",
        threads=args.threads,
        steps=args.steps,
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        d_ff=model.d_ff,
        seq_len=training.seq_len,
        batch_size=training.batch_size,
    )


def start(name: str, python: str, script: str, sizes: Sizes, folder: Path) -> Contestant:
    log = folder / f"{name.replace(' ', '-').replace('/', '-')}.log"
    command = [python, str(HERE / "contestants" / script), *sizes.to_args()]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=folder,
        )
    return Contestant(name, process, log, [])


def has_module(python: str | None, module: str) -> bool:
    if python is None:
        return False
    test = [python, "-c", f"import importlib.util as u, sys; sys.exit(not u.find_spec('{module}'))"]
    try:
        return subprocess.run(test, capture_output=True).returncode == 0
    except OSError:
        return False


def line_up(args: argparse.Namespace, sizes: Sizes, folder: Path) -> list[Contestant]:
    """Start and warm up all contestants that are installed, one after the other."""
    wanted = {OURS: (sys.executable, "modern_llm_trainer.py", "")}
    for overrides in args.also:
        wanted[f"{OURS} {overrides}"] = (sys.executable, "modern_llm_trainer.py", overrides)
    for name, (script, variant) in PEERS.items():
        is_litgpt = name.startswith("litgpt")
        python = args.litgpt_python if is_litgpt else (args.transformers_python or sys.executable)
        if args.only and not any(part in name for part in args.only):
            continue
        if not has_module(python, "litgpt" if is_litgpt else "transformers"):
            print(f"{name}: not installed (name its interpreter: --help)", flush=True)
            continue
        wanted[name] = (python, script, variant)
    contestants = []
    for name, (python, script, variant) in wanted.items():
        contestant = start(name, python, script, replace(sizes, variant=variant), folder)
        contestants.append(contestant)
        contestant.wait_ready()
        warm_up_s = [contestant.run_group() for _ in range(args.warm_up)]
        print(f"{name}: first {sizes.steps} steps {warm_up_s[0]:.1f} s (compilation)", flush=True)
    return contestants


def compete(contestants: list[Contestant], rounds: int, clock: str) -> None:
    """Take turns; the order is shuffled each round, so that nobody always follows the same."""
    order, rng = list(contestants), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for contestant in order:
            contestant.seconds.append(contestant.run_group(clock=clock))


def results(contestants: list[Contestant], tokens: int) -> dict[str, dict[str, float]]:
    """Per contestant: median tokens/s, median ms a step group, our speed over its speed."""
    ours = contestants[0].seconds
    return {
        c.name: {
            "tokens_per_s": tokens / statistics.median(c.seconds),
            "best_tokens_per_s": tokens / min(c.seconds),
            "ours_over_it": statistics.median(
                theirs / own for theirs, own in zip(c.seconds, ours, strict=True)
            ),
        }
        for c in contestants
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "train_10m.json")
    parser.add_argument("--litgpt-python", help="interpreter of a venv that has litgpt")
    parser.add_argument("--transformers-python", help="default: this interpreter")
    parser.add_argument("--only", action="append", default=[], help="peers whose name has this")
    parser.add_argument("--also", action="append", default=[], help="our own, with overrides")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of one turn")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before the clock runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, which a busy machine changes less; with --threads 1",
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.config = args.config.resolve()
    config = load_config(args.config, [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(config, folder / "tokens.npy")
        sizes = sizes_of(config, args, folder / "tokens.npy")
        contestants = line_up(args, sizes, folder)
        try:
            compete(contestants, args.rounds, args.clock)
        finally:
            for contestant in contestants:
                contestant.stop()
    table = results(contestants, args.steps * sizes.batch_size * sizes.seq_len)
    print(f"\n{'':34} tokens/s   best   ours is x times as fast ({args.rounds} rounds, medians)")
    for name, row in table.items():
        speeds = f"{row['tokens_per_s']:8.0f} {row['best_tokens_per_s']:8.0f}"
        print(f"{name:34} {speeds}   {row['ours_over_it']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()

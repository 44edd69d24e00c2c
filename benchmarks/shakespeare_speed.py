"""Seconds to a validation loss of 1.88 on tinyshakespeare: nanoGPT's CPU setting, and `speed`.

    MODERN_LLM_DATA=PATH python benchmarks/shakespeare_speed.py --rounds 5

A round is one seed: each preset pretrains once, in a process of its own, in turn first and second.
The loss is that of the last step over the whole validation split. Training seconds are those of the
optimizer steps; the process's also hold imports, two validation passes, checkpoints and the report.
Text is tokenized before the first round. Trailing ``section.field=value`` go to both presets.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.config import load_config
from modern_llm.errors import DataError

TARGET = 1.88  # nats a character, which nanoGPT's README gives for its CPU setting
PEER, OURS = "nanogpt-cpu", "speed"


@dataclass
class Run:
    """One finished pretraining; seconds are of the wall clock, but for ``processor_s``."""

    preset: str
    seed: int
    steps: int
    loss: float
    train_s: float
    process_s: float
    processor_s: float  # user and system time of the whole process

    @property
    def missed(self) -> bool:
        """Whether the loss is above the target."""
        return self.loss > TARGET


def fill_cache(overrides: list[str], folder: Path) -> None:
    """Tokenize the text of both presets."""
    for preset in (PEER, OURS):
        stage = PretrainStage(load_config(preset, overrides), folder, None)
        _ = stage.stores, stage.validation_store


def pretrain(preset: str, seed: int, folder: Path, overrides: list[str], steps: int | None) -> Run:
    """Run the command line's pretraining in a process of its own.

    Raises:
        SystemExit: it failed; shows the last lines of its log.
    """
    name = f"{preset}-{seed}"
    command = [sys.executable, "-m", "modern_llm", "run", "--stage", "pretrain"]
    command += ["--config", preset, "--output-dir", str(folder), "--run-name", name]
    command += [] if steps is None else ["--max-steps", str(steps)]
    log = folder / f"{name}.log"
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen([*command, f"seed={seed}", *overrides], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{name} ended with {process.returncode}:\n{tail}")
    stage = folder / name / "pretrain"
    training = json.loads((stage / "result.json").read_text())["training"]
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert last["step"] == training["steps"]
    return Run(
        preset, seed, training["steps"], last["loss"], training["seconds"],
        seconds, usage.ru_utime + usage.ru_stime,
    )  # fmt: skip


def compete(args: argparse.Namespace, folder: Path) -> list[Run]:
    """All runs; who begins changes from round to round."""
    shared = ["pretrain.training.eval_every=0", f"data.cache_dir={folder / 'cache'}"]
    overrides = [f"pretrain.training.threads={args.threads}", *shared, *args.overrides]
    fill_cache(overrides, folder)
    runs = []
    for round_ in range(args.rounds):
        order = (PEER, OURS) if round_ % 2 == 0 else (OURS, PEER)
        for preset in order:
            run = pretrain(preset, args.first_seed + round_, folder, overrides, args.max_steps)
            runs.append(run)
            print(
                f"{preset:12} seed {run.seed}: loss {run.loss:.4f}, training {run.train_s:.1f} s, "
                f"process {run.process_s:.1f} s, processor {run.processor_s:.1f} s",
                flush=True,
            )
    return runs


def table(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Per preset: loss over seeds, medians of the seconds; and the peer's over ours, by round."""
    rows: dict[str, dict[str, float]] = {}
    for preset in (PEER, OURS):
        own = [run for run in runs if run.preset == preset]
        losses = [run.loss for run in own]
        rows[preset] = {
            "steps": own[0].steps,
            "loss": statistics.mean(losses),
            "least_loss": min(losses),
            "largest_loss": max(losses),
            "missed": sum(run.missed for run in own),
        }
        for field in ("train_s", "process_s", "processor_s"):
            mine = {run.seed: getattr(run, field) for run in own}
            ours = {run.seed: getattr(run, field) for run in runs if run.preset == OURS}
            rows[preset][field] = statistics.median(mine.values())
            rows[preset][f"{field}_over_ours"] = statistics.median(
                mine[seed] / ours[seed] for seed in mine
            )
    return rows


def show(rows: dict[str, dict[str, float]], rounds: int) -> None:
    """Print the table; in brackets the median ratio to ours of the rounds."""
    print(f"\n{'':12} steps  loss (range)             training        process         processor")
    for preset, row in rows.items():
        loss = f"{row['loss']:.4f} ({row['least_loss']:.4f}-{row['largest_loss']:.4f})"
        seconds = "  ".join(
            f"{row[field]:6.1f} s ({row[f'{field}_over_ours']:4.1f})"
            for field in ("train_s", "process_s", "processor_s")
        )
        print(f"{preset:12} {row['steps']:5.0f}  {loss}  {seconds}")
    for preset, row in rows.items():
        if row["missed"]:
            print(f"{preset}: {row['missed']:.0f} of {rounds} runs missed a loss of {TARGET}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="seeds")
    parser.add_argument("--first-seed", type=int, default=30, help="the search used 0 to 21")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-steps", type=int, help="cap the steps, to try the script")
    parser.add_argument("--json", type=Path, help="also write table and runs here")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_args()


def main() -> int:
    """0 when every run of ours reached the target, else 1."""
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        try:
            runs = compete(args, Path(name))
        except DataError as error:
            raise SystemExit(f"error: {error}") from None
    rows = table(runs)
    show(rows, args.rounds)
    if args.json:
        record = {"target": TARGET, "table": rows, "runs": [asdict(run) for run in runs]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if rows[OURS]["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())

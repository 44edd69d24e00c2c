"""Preparing token stores end to end against the bare batch call of `tokenizers`, as a ratio.

    MODERN_LLM_DATA=PATH python benchmarks/tokenization.py --source wikitext2 --jobs 2

One contestant is the library alone: ``encode_batch_fast`` (and ``encode_batch``) on a list of all
texts in memory, its own threads on the same cores, ids not even looked at. The other is what
``prepare-data`` does: read the rows from their file, check, encode in processes, make arrays, hash
twice, write shards, sync, publish. Each turn is a process of its own, so that no cache of words is
warm; the clock runs in it from its first text to its end. They take turns; a round gives one ratio,
and the median over rounds is quoted. The tokenizer is made before.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The package is imported where it is used: each process that encodes imports this file anew.

BARE = ("encode_batch_fast", "encode_batch")
OURS = "prepare"
CLOCKS = ("wall", "cpu")


def clocks() -> dict[str, float]:
    """Seconds on the wall, and of processor time with that of processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"wall": time.perf_counter(), "cpu": sum(u.ru_utime + u.ru_stime for u in used)}


def source_of(args: argparse.Namespace, cache: Path) -> tuple[Any, Any]:
    from modern_llm.config import DataConfig, SourceConfig
    from modern_llm.data.sources import open_source

    data = DataConfig(cache_dir=cache)
    return open_source(SourceConfig(name=args.source, options=args.options), data), data


def texts_of(args: argparse.Namespace, source: Any) -> list[str]:
    """The texts of the train split, up to ``--mb``."""
    texts, size = [], 0
    for row in source.rows("train"):
        texts.append(row["text"])
        size += len(row["text"])
        if size >= args.mb * 1e6:
            break
    return texts


def turn(args: argparse.Namespace, folder: Path) -> None:
    """One turn of one contestant, in a process of its own; prints seconds and tokens."""
    from modern_llm.data.making import Making, making
    from modern_llm.data.prepare import text_store
    from modern_llm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    source, data = source_of(args, folder / "cache")
    if args.turn in BARE:
        texts = texts_of(args, source)
        encode = getattr(tokenizer.backend, args.turn)
        begin = clocks()
        encodings = encode(texts, add_special_tokens=False)
        end = clocks()
        tokens = sum(len(encoding) for encoding in encodings) + 2 * len(texts)
    else:
        source.fingerprint("train")  # hashes the text once, and remembers
        begin = clocks()
        with making(Making(jobs=args.jobs)):
            store = text_store([source], "train", tokenizer, data, max_rows=args.rows)
        end = clocks()
        tokens = store.n_tokens
    taken = {clock: end[clock] - begin[clock] for clock in CLOCKS}
    print(json.dumps({**taken, "tokens": tokens}))


def run_turn(name: str, args: argparse.Namespace, folder: Path, rows: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--turn", name, "--folder", str(folder)]
    command += ["--source", args.source, "--options", json.dumps(args.options)]
    command += ["--mb", str(args.mb), "--jobs", str(args.jobs), "--rows", str(rows)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(args.jobs)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    subprocess.run(["rm", "-rf", str(folder / "cache" / "stores")], check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table_of(
    found: dict[str, list[dict[str, float]]], clock: str, tokens: float
) -> dict[str, dict[str, Any]]:
    """Per contestant: its speed, and that of preparing over it, by one clock."""
    seconds = {name: [one[clock] for one in turns] for name, turns in found.items()}
    table = {}
    for name in (*BARE, OURS):
        ratios = [a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)]
        table[name] = {
            "tokens_per_s": tokens / statistics.median(seconds[name]),
            "prepare_over_it": statistics.median(ratios),
            "range": (min(ratios), max(ratios)),
        }
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="wikitext2", help="a source of text")
    parser.add_argument("--options", type=json.loads, default={}, help="of the source, as JSON")
    parser.add_argument("--tokenizer", default="bpe", choices=["bpe", "gpt2", "char"])
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--mb", type=float, default=20, help="megabytes of text at most")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.turn:
        turn(args, args.folder)
        return
    from modern_llm.config import TokenizerConfig
    from modern_llm.data.tokenizer import build_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, data = source_of(args, folder / "cache")
        texts = texts_of(args, source)
        limit = 4 if args.tokenizer == "bpe" else None
        config = TokenizerConfig(name=args.tokenizer, **({"max_train_mb": limit} if limit else {}))
        vocab_size = 50304 if args.tokenizer == "gpt2" else args.vocab_size
        build_tokenizer(
            config, vocab_size=vocab_size, texts=lambda: iter(texts), data=data, fingerprint="own"
        ).save(folder / "tokenizer.json")
        names, rng = [*BARE, OURS], random.Random(0)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(args.rounds + 1):
            rng.shuffle(names)
            for name in names:
                one = run_turn(name, args, folder, len(texts))
                if number:  # the first round warms the disk's cache
                    found[name].append(one)
    counts = {one["tokens"] for turns in found.values() for one in turns}
    if len(counts) > 1:
        raise SystemExit(f"the contestants do not have the same tokens: {counts}")
    tokens = counts.pop()
    print(f"{source.description}, tokenizer {args.tokenizer} of {vocab_size}, {len(texts)} texts,")
    print(f"{sum(map(len, texts)) / 1e6:.1f} M characters, {tokens / 1e6:.2f} M tokens, ", end="")
    print(f"{args.jobs} cores; medians of {args.rounds} rounds")
    table = {clock: table_of(found, clock, tokens) for clock in CLOCKS}
    for clock, rows in table.items():
        for name, row in rows.items():
            low, high = row["range"]
            told = f"{row['prepare_over_it']:.2f} ({low:.2f}-{high:.2f})"
            speed = f"{row['tokens_per_s']:10,.0f} tokens a second"
            print(f"{clock:4} {name:18} {speed}, prepare is {told} times as fast")
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()

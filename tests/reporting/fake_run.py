"""A made-up run folder in the formats that the stages write; numbers are drawn, not trained."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

STAGES = ("pretrain", "sft", "dpo", "verifier")
STEPS = {"pretrain": 400, "sft": 200, "dpo": 120, "verifier": 160}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSIONS = {"python": "3.11.9", "torch": "2.10.0", "numpy": "2.1.0"}
HARDWARE = {"platform": "Linux x86_64", "cpu": "Made-up CPU", "cores": 2, "threads": 2, "gpus": []}
PROMPT = "Tom has 3 | 4 apples."
HOSTILE = "a | b `code` <script>alert(1)</script> [x](http://evil.example)\n# not a heading ```"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def score(key: str, metric: str, value: float, half: float, n: int) -> dict[str, Any]:
    ci95 = [value - half, value + half]
    return {"key": key, "metric": metric, "value": value, "ci95": ci95, "n": n, "note": ""}


def metric_rows(stage: str, config_sha256: str) -> list[dict[str, Any]]:
    rng = random.Random(stage)
    last = STEPS[stage]
    start = {"pretrain": 6.9, "sft": 2.6, "dpo": math.log(2), "verifier": 1.6}[stage]
    end = {"pretrain": 1.4, "sft": 0.5, "dpo": 0.18, "verifier": 0.6}[stage]

    def curve(step: int) -> float:
        return end + (start - end) * math.exp(-4 * step / last)

    rows: list[dict[str, Any]] = [
        {
            "kind": "start", "step": 0, "config_sha256": config_sha256, "git_commit": COMMIT,
            "versions": VERSIONS, "seed": 0, "data_fingerprint": sha(f"data {stage}"),
            "resumed_from": None, "time": "2025-06-01T10:00:00+00:00",
            "unit": "pair" if stage == "dpo" else "token", "time_s": 0.0,
        },
        {"kind": "eval", "step": 0, "loss": curve(0), "time_s": 0.1},
    ]  # fmt: skip
    for step in range(2, last + 1, 2):
        row = {
            "kind": "train", "step": step, "loss": curve(step) + rng.gauss(0, 0.06 * end + 0.01),
            "lr": 3e-3 * min(1, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / last)),
            "grad_norm": 0.4 + abs(rng.gauss(0, 0.2)), "tokens": step * 4096, "units": 4096,
            "tokens_per_s": 21000 + rng.gauss(0, 500), "mfu": 0.31, "memory_gb": 0.8,
            "time_s": step * 0.2,
        }  # fmt: skip
        if stage == "dpo":
            grown = 1 - math.exp(-4 * step / last)
            row |= {
                "margin": 3.0 * grown + rng.gauss(0, 0.25),
                "accuracy": min(1.0, 0.5 + 0.45 * grown + rng.gauss(0, 0.03)),
                "chosen_reward": -0.6 * grown + rng.gauss(0, 0.15),
                "rejected_reward": -3.6 * grown + rng.gauss(0, 0.2),
            }
        rows.append(row)
        if step % (last // 5) == 0:
            held_out = {"kind": "eval", "step": step, "loss": curve(step) + 0.05}
            if stage == "dpo":
                held_out |= {"accuracy": 0.5 + 0.42 * grown, "margin": 2.6 * grown}
            rows += [held_out, {"kind": "save", "step": step}]
    rows.append(
        {"kind": "stop", "step": last, "status": "finished", "tokens": last * 4096,
         "loss": rows[-3]["loss"]}
    )  # fmt: skip
    return rows


def write_checkpoint(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    files = {"model.safetensors": {"bytes": 64, "sha256": sha("\0" * 64)}}
    dump(folder / "manifest.json", {"format": 1, "files": files, "at": folder.parent.name})
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def provenance(config_sha256: str) -> dict[str, Any]:
    return {
        "git_commit": COMMIT, "dirty": False, "config_sha256": config_sha256, "seed": 0,
        "versions": VERSIONS, "hardware": HARDWARE, "started": "2025-06-01T10:00:00+00:00",
        "ended": "2025-06-01T10:01:20+00:00", "restarts": 0,
    }  # fmt: skip


def write_stage(run: Path, stage: str, config_sha256: str, parent: Any) -> dict[str, Any]:
    folder = run / stage
    checkpoint = {
        "path": f"{stage}/final",
        "sha256": write_checkpoint(folder / "final"),
    }
    rows = metric_rows(stage, config_sha256)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = min((r for r in rows if r["kind"] == "eval"), key=lambda r: r["loss"])
    kind = {"pretrain": "text", "sft": "instruct", "dpo": "pairs", "verifier": "problems"}[stage]
    dropped = {"equal answers": 7, "too long": 2} if stage == "dpo" else {}
    unmet = [{"what": "rouge", "why": "evaluate's metric is on the hub: no network"}]
    dump(
        folder / "result.json",
        {
            "format": 1, "stage": stage, "status": "finished",
            "training": {
                "steps": STEPS[stage], "tokens": STEPS[stage] * 4096, "seconds": 80.5,
                "tokens_per_s": 20800.0, "mfu": 0.31, "peak_memory_gb": 0.81,
                "final_loss": rows[-1]["loss"],
                "best": {"step": best["step"], "loss": best["loss"]},
            },
            "data": [{
                "source": "synthetic", "split": "train", "kind": kind, "rows": 12000,
                "tokens": 1234567, "dropped": dropped, "fingerprint": sha(f"data {stage}"),
            }],
            "parent": parent, "checkpoint": checkpoint, "scores": [],
            "audit": {"supervised_share": 0.41} if stage == "sft" else None,
            "not_evaluated": unmet if stage == "sft" else [],
            "model": {
                "params": 1_130_000, "active_params": 1_130_000, "flops_per_token": 7.1e6,
                "summary": "4 layers, d_model 128, rope, rmsnorm, swiglu, 4/2 heads",
            },
            "provenance": provenance(config_sha256),
        },
    )  # fmt: skip
    if stage in ("sft", "dpo"):
        (folder / "mask_audit.txt").write_text(
            "supervised share 41.0 %\nrow 0\n  <|user|> 2 + 3 ```<|assistant|> [[5<|eos|>]]\n"
        )
    return checkpoint


def models_of(run: Path) -> list[dict[str, Any]]:
    numbers = {  # perplexity, bits per byte, strict, flexible, preference
        "pretrain": (4.05, 0.912, 0.02, 0.03, 0.51),
        "sft": (4.32, 0.944, 0.62, 0.64, 0.55),
        "dpo": (4.40, 0.951, 0.615, 0.64, 0.905),
    }
    models = []
    for stage, (ppl, bits, strict, flexible, preference) in numbers.items():
        models.append({
            "stage": stage,
            "checkpoint": load(run / stage / "result.json")["checkpoint"],
            "scores": [
                score("synthetic.test/ctx128/stride128", "token_perplexity", ppl, 0.06, 51200),
                score("synthetic.test/ctx128/stride64", "token_perplexity", ppl - 0.1, 0.06, 51200),
                score("synthetic.test/ctx128/stride64", "bits_per_byte", bits, 0.01, 204800),
                score("synthetic.test/greedy", "exact_match", strict, 0.019, 200),
                score("synthetic.test/greedy", "exact_match_flexible", flexible, 0.066, 200),
                score("synthetic.test/pairs", "preference_accuracy", preference, 0.04, 400),
            ],
            "samples": [
                {"task": "problem", "prompt": PROMPT, "text": f"{stage} {HOSTILE}"},
                {"task": "text", "prompt": "Once upon", "text": f"{stage} said so."},
            ],
        })  # fmt: skip
    return models


def reasoning() -> dict[str, Any]:
    def points(values: list[float]) -> list[dict[str, float]]:
        return [{"value": v, "lo": v - 0.06, "hi": min(1.0, v + 0.06)} for v in values]

    bins = []
    for i in range(10):
        mean = i / 10 + 0.05
        right = min(1.0, mean**1.3 + 0.03)
        bins.append({
            "lo": i / 10, "hi": (i + 1) / 10, "mean_score": mean,
            "accuracy": right, "n": 90 + 22 * (i - 5) ** 2,
            "ci95": [max(0.0, right - 0.09), min(1.0, right + 0.07)],
        })  # fmt: skip
    bins[4] = {"lo": 0.4, "hi": 0.5, "mean_score": None, "accuracy": None, "n": 0, "ci95": None}
    return {
        "policy": "dpo", "n_problems": 200, "temperature": 0.7,
        "curves": {
            "n": [1, 2, 4, 8], "pass1": points([0.58])[0],
            "majority": points([0.58, 0.585, 0.64, 0.68]),
            "most_likely": points([0.58, 0.62, 0.66, 0.70]),
            "verifier": points([0.58, 0.69, 0.75, 0.79]),
            "oracle": points([0.58, 0.74, 0.85, 0.92]),
        },
        "auroc": score("synthetic.test/n8", "auroc", 0.91, 0.012, 1600),
        "ece": score("synthetic.test/n8", "ece", 0.043, 0.01, 1600),
        "reliability": bins, "base_rate": 0.58,
        "scores": [
            score("synthetic.test/T0.7", "pass@1", 0.58, 0.06, 200),
            score("synthetic.test/T0.7", "majority@8", 0.68, 0.06, 200),
            score("synthetic.test/T0.7", "best_of_8", 0.79, 0.06, 200),
            score("synthetic.test/T0.7", "best_of_8 - majority", 0.11, 0.06, 200),
            score("synthetic.test/T0.7", "best_of_8 - most_likely", 0.09, 0.05, 200),
            score("synthetic.test/T0.7", "best_of_8 - pass@1", 0.21, 0.05, 200),
            score("synthetic.test/n8", "auroc", 0.91, 0.012, 1600),
        ],
    }  # fmt: skip


def build(root: Path, config: dict[str, Any], config_sha256: str, name: str = "made-up") -> Path:
    run = root / name
    dump(run / "config.json", config)
    environment = {"git_commit": COMMIT, "dirty": False, "versions": VERSIONS}
    dump(run / "environment.json", {**environment, "hardware": HARDWARE, "time": "2025-06-01"})
    parent = None
    for stage in STAGES:
        checkpoint = write_stage(run, stage, config_sha256, parent)
        parent = {"stage": stage, **checkpoint} if stage != "dpo" else parent
        if stage == "dpo":
            parent = {"stage": "dpo", **checkpoint}
    dump(
        run / "eval" / "result.json",
        {
            "format": 1, "stage": "eval", "models": models_of(run), "reasoning": reasoning(),
            "baselines": [], "provenance": provenance(config_sha256),
            "not_evaluated": [{"what": "gpt2 baseline", "why": "weights not found: no network"}],
        },
    )  # fmt: skip
    return run

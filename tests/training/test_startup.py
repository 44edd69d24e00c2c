"""What a stage tells before it trains, and its whole record in one file after."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.config import ModelConfig, TrainingConfig, get_pipeline_preset, list_presets
from modern_llm.models import ModernDecoderLM
from modern_llm.training import startup
from modern_llm.training.startup import amount, architecture, startup_facts, startup_lines
from modern_llm.training.throughput import ASSUMED_MFU, Peak

CPU = torch.device("cpu")
STAGES = ("pretrain", "sft", "dpo", "verifier")


@pytest.fixture
def facts(
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., ModernDecoderLM],
    make_config: Callable[..., TrainingConfig],
) -> Callable[..., dict[str, Any]]:
    """Facts of a tiny model on a device of 1 TFLOP/s, or of an unknown one."""

    def tell(peak: Peak | None = Peak(1e12, "a data sheet"), **model: Any) -> dict[str, Any]:  # noqa: B008
        monkeypatch.setattr(startup, "device_peak", lambda device, precision: peak)
        decoder = make_model(**model)
        training = make_config(batch_size=8, micro_batch_size=2, max_steps=12)
        return startup_facts(
            decoder, decoder.config, decoder.cost(training.seq_len), training,
            steps_per_pass=8, device=CPU,
        )  # fmt: skip

    return tell


def test_the_numbers_of_a_start(facts: Callable[..., dict[str, Any]]) -> None:
    """A layer of width 16, 8 tokens, d_ff 64: counted by hand."""
    told = facts()
    layers, width, hidden, vocab, length = 2, 16, 64, 32, 8
    projections = layers * 2 * 4 * width**2
    scores = layers * 2 * 2 * length * width
    ffn = layers * 2 * 3 * width * hidden
    head = 2 * vocab * width
    flops = told["flops_per_token"]
    assert flops["parts"] == {
        "projections": projections, "attention": scores, "ffn": ffn, "head": head,
    }  # fmt: skip
    assert flops["attention"] == projections + scores
    assert flops["feed_forward"] == ffn
    assert flops["attention_to_feed_forward"] == pytest.approx((projections + scores) / ffn)
    assert flops["training"] == 3 * (projections + scores + ffn + head)
    matrices = layers * (4 * width**2 + 3 * width * hidden)
    total = vocab * width + matrices + (2 * layers + 1) * width
    assert told["parameters"] == {
        "total": total, "trained": total, "embedding": vocab * width, "active": total,
    }  # fmt: skip
    assert told["batch"] == {
        "micro_batch_rows": 2, "accumulation": 4, "rows": 8, "seq_len": 8,
        "tokens_per_step": 64, "steps": 12, "tokens": 768, "steps_per_pass": 8, "passes": 1.5,
        "ranks": 1, "engine": "none",
    }  # fmt: skip
    assert told["expected"]["bound_tokens_per_s"] == pytest.approx(1e12 / flops["training"])
    expected = ASSUMED_MFU * 1e12 / flops["training"]
    assert told["expected"]["tokens_per_s"] == pytest.approx(expected)
    assert json.loads(json.dumps(told)) == told  # plain values


def test_frozen_parameters_are_not_trained(
    facts: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ModernDecoderLM.__init__

    def frozen(self: ModernDecoderLM, config: ModelConfig) -> None:
        made(self, config)
        self.embedding.requires_grad_(False)

    monkeypatch.setattr(ModernDecoderLM, "__init__", frozen)
    counts = facts()["parameters"]
    assert counts["total"] - counts["trained"] == counts["embedding"] == 32 * 16


def test_an_unknown_device_promises_nothing(facts: Callable[..., dict[str, Any]]) -> None:
    told = facts(peak=None)
    assert told["peak"] is told["expected"] is None
    lines = "\n".join(startup_lines(told))
    assert "peak        n/a" in lines
    assert "expected    n/a" in lines


def test_the_lines_of_a_start(facts: Callable[..., dict[str, Any]]) -> None:
    told = facts(moe={"n_experts": 4, "top_k": 2})
    lines = "\n".join(startup_lines(told))
    counts = told["parameters"]
    assert counts["active"] < counts["total"]
    assert f"{amount(counts['active'])} active" in lines
    assert told["architecture"]["name"] in lines
    assert "2 of 4 experts a token" in lines
    assert "2 rows x 4 micro-batches = 8 rows; x 8 = 64 tokens a step" in lines
    assert "1.50 passes over the data" in lines
    assert "1 TFLOP/s fp32 (a data sheet)" in lines
    assert f"assumed MFU of {ASSUMED_MFU:.0%}; bound at 100%: " in lines
    assert f"{torch.get_num_threads()} threads" in lines
    assert "active" not in "\n".join(startup_lines(facts()))


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_is_described(preset: str) -> None:
    model = get_pipeline_preset(preset).model
    told = architecture(model)
    assert told.isascii()
    wanted = (
        f"{model.n_layers} layers", f"width {model.d_model}", model.norm.name, model.ffn.name,
        model.position.name, f"vocabulary {model.vocab_size}", f"context {model.max_seq_len}",
    )  # fmt: skip
    assert all(part in told for part in wanted), told


def test_amounts() -> None:
    assert [amount(x) for x in (0, 999, 1000, 2.05e6, 3e9, 1.5e12)] == [
        *("0", "999", "1 k", "2.05 M", "3 G", "1.5 T"),
    ]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_file_is_the_whole_record(tiny_run: Any, stage: str) -> None:
    folder = tiny_run.run / stage
    record = json.loads((folder / "run.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "eval")}
    assert list(record) == [
        *("config", "evaluations", "format", "iterations", "startup", "summary"),
    ]  # fmt: skip
    assert record["config"] == json.loads((tiny_run.run / "config.json").read_text())
    assert [{"kind": "train", **row} for row in record["iterations"]] == of_kind["train"]
    assert [{"kind": "eval", **row} for row in record["evaluations"]] == of_kind["eval"]
    result = json.loads((folder / "result.json").read_text())
    assert result == {"format": 1, **record["summary"]}
    assert record["startup"] == rows[0]["startup"]
    assert record["startup"]["parameters"]["total"] == result["model"]["params"]
    assert record["startup"]["flops_per_token"]["training"] == result["model"]["flops_per_token"]
    assert (record["summary"]["inference"] is not None) is (stage == "pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_a_perplexity_is_where_the_loss_is_nats_a_token(tiny_run: Any, stage: str) -> None:
    lines = (tiny_run.run / stage / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] in ("train", "eval")]
    assert rows
    for row in rows:
        assert ("perplexity" in row) is (stage in ("pretrain", "sft"))
        if "perplexity" in row:
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))


@pytest.mark.parametrize("stage", STAGES)
def test_a_result_has_sizes_and_times(tiny_run: Any, stage: str) -> None:
    folder: Path = tiny_run.run / stage
    result = json.loads((folder / "result.json").read_text())
    assert result["model"]["bytes"] == (folder / "final" / "model.safetensors").stat().st_size
    training = result["training"]
    batch = json.loads((folder / "run.json").read_text())["startup"]["batch"]
    assert training["passes"] == training["steps"] / batch["steps_per_pass"] == batch["passes"]
    assert training["epoch_s"] * training["passes"] == pytest.approx(training["seconds"])
    rows = (row for row in map(json.loads, (folder / "metrics.jsonl").open()))
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert training["peak_memory_gb"] >= last["memory_peak_gb"] - 0.001
    dense = last["tokens_per_s"] * result["model"]["flops_per_token"] / 1e12
    if stage == "pretrain":
        assert last["tflops"] == pytest.approx(dense, rel=1e-4)
    else:  # the head computes at answers only
        assert last["tflops"] < dense

"""What a stage is about to do, told once before its first step: model, work, machine, speed."""

from typing import Any

import torch
from torch import nn

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.config.schema import Component
from modern_llm.models.cost import Cost
from modern_llm.runtime.devices import hardware
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.ranks import group
from modern_llm.training.throughput import ASSUMED_MFU, Peak, device_peak

log = get_logger(__name__)


def startup_facts(
    model: nn.Module,
    config: ModelConfig,
    cost: Cost,
    training: TrainingConfig,
    *,
    steps_per_pass: int,
    device: torch.device,
) -> dict[str, Any]:
    """All that is known of a stage before it trains, as plain values.

    Args:
        model: what is trained.
        config: of its decoder.
        cost: of the model at ``training.seq_len`` tokens.
        training: of the stage; its precision is no ``auto`` any more.
        steps_per_pass: optimizer steps in which all training data is seen once.
        device: where it trains; its peak is measured if that was not done yet.
    """
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    peak = device_peak(device, training.precision)
    return {
        "architecture": {"name": config.short_name, "summary": architecture(config)},
        "parameters": {
            "total": sum(n for n, _ in counts),
            "trained": sum(n for n, trained in counts if trained),
            "embedding": cost.embedding_params,
            "active": cost.active_params,
        },
        "flops_per_token": {
            "parts": dict(cost.parts),
            "attention": cost.attention_flops,
            "feed_forward": cost.feed_forward_flops,
            "attention_to_feed_forward": cost.attention_flops / cost.feed_forward_flops,
            "forward": cost.flops_per_token_forward,
            "training": cost.flops_per_token_training,
        },
        "batch": batch_facts(training, steps_per_pass),
        "hardware": hardware(device),
        "precision": training.precision,
        "peak": peak and {"flops": peak.flops, "source": peak.source},
        "expected": peak and expected_speed(peak, cost),
    }


def architecture(config: ModelConfig) -> str:
    """Sizes and components of a decoder in one sentence."""
    ffn = _named(config.ffn)
    if config.ffn.name == "standard":
        ffn = f"{ffn} ({config.activation})"
    if config.moe is not None:
        where = f" in every {config.moe.every}th layer" if config.moe.every > 1 else ""
        ffn = f"{ffn}, {config.moe.top_k} of {config.moe.n_experts} experts a token{where}"
    attention: str = config.attention
    if config.window is not None:
        sinks = f" + {config.n_sinks} first" if config.n_sinks else ""
        attention = f"window of {config.window}{sinks}, layers {config.window_pattern}"
    if config.attention != "linear":
        attention = f"{attention} ({config.attention_backend})"
    flags = {
        "query-key norm": config.qk_norm,
        "learned sink": config.sink == "learned",
        f"logits below {config.softcap}": config.softcap is not None,
        "biases": config.bias,
        "tied embeddings": config.tie_embeddings,
        f"dropout {config.dropout}": config.dropout > 0,
    }
    parts = [
        f"{config.n_layers} layers of width {config.d_model}",
        f"{config.n_heads} heads of {config.head_size} ({config.n_kv_heads} of keys and values)",
        f"attention {attention}",
        f"feed-forward {config.d_ff} {ffn}",
        f"norm {_named(config.norm)} {config.norm_position}",
        f"position {_named(config.position)}",
        *(name for name, on in flags.items() if on),
        f"vocabulary {config.vocab_size}",
        f"context {config.max_seq_len}",
    ]
    return ", ".join(parts)


def _named(component: Component) -> str:
    options = " ".join(f"{key}={value}" for key, value in component.options.items())
    return f"{component.name} [{options}]" if options else component.name


def batch_facts(training: TrainingConfig, steps_per_pass: int) -> dict[str, Any]:
    """Rows and tokens of a step and of the stage; tokens count the padding of short rows."""
    tokens_per_step, ranks = training.batch_size * training.seq_len, group().world_size
    return {
        "micro_batch_rows": training.micro_batch_size,
        "accumulation": training.batch_size // (training.micro_batch_size * ranks),
        "ranks": ranks,
        "engine": training.distributed.name,
        "rows": training.batch_size,
        "seq_len": training.seq_len,
        "tokens_per_step": tokens_per_step,
        "steps": training.max_steps,
        "tokens": training.max_steps * tokens_per_step,
        "steps_per_pass": steps_per_pass,
        "passes": training.max_steps / steps_per_pass,
    }


def expected_speed(peak: Peak, cost: Cost) -> dict[str, float]:
    """Tokens a second that all ranks' peak allows, and at the MFU that an estimate counts on."""
    bound = group().world_size * peak.flops / cost.flops_per_token_training
    return {
        "bound_tokens_per_s": bound,
        "assumed_mfu": ASSUMED_MFU,
        "tokens_per_s": ASSUMED_MFU * bound,
    }


def tell_startup(stage: str, facts: dict[str, Any]) -> None:
    """Log the facts of a stage, a line a subject."""
    for line in startup_lines(facts):
        log.info("%s  %s", stage, line)


def startup_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `startup_facts`, readable."""
    params, flops, batch = facts["parameters"], facts["flops_per_token"], facts["batch"]
    machine, peak, expected = facts["hardware"], facts["peak"], facts["expected"]
    active = f", {amount(params['active'])} active" if params["active"] < params["total"] else ""
    parts = "  ".join(f"{name} {amount(value)}" for name, value in flops["parts"].items())
    memory = "n/a" if machine["memory_gb"] is None else f"{machine['memory_gb']} GB"
    known = "n/a: this device is not in the table"
    if peak is not None:
        known = f"{peak['flops'] / 1e12:,.3g} TFLOP/s {facts['precision']} ({peak['source']})"
    ranks = f" x {batch['ranks']} ranks ({batch['engine']})" if batch["ranks"] > 1 else ""
    speed = "n/a: the peak is not known"
    if expected is not None:
        speed = (
            f"{expected['tokens_per_s']:,.0f} tok/s at an assumed MFU of "
            f"{expected['assumed_mfu']:.0%}; bound at 100%: "
            f"{expected['bound_tokens_per_s']:,.0f} tok/s"
        )
    return [
        f"model       {facts['architecture']['name']}: {facts['architecture']['summary']}",
        f"parameters  {amount(params['total'])} ({amount(params['trained'])} trained, "
        f"{amount(params['embedding'])} embedding{active})",
        f"FLOPs       a token, forward: {parts}; attention : feed-forward = "
        f"{flops['attention_to_feed_forward']:.2f}; training: {amount(flops['training'])} "
        "(the head at every token)",
        f"batch       {batch['micro_batch_rows']} rows x {batch['accumulation']} micro-batches"
        f"{ranks} = "
        f"{batch['rows']} rows; x {batch['seq_len']} = {batch['tokens_per_step']:,} tokens a step; "
        f"x {batch['steps']:,} steps = {amount(batch['tokens'])} tokens (padding counted), "
        f"{batch['passes']:.2f} passes over the data",
        f"hardware    {machine['device']}: {machine['name']}, {machine['threads']} threads of "
        f"{machine['cores']} cores, {memory} memory; precision {facts['precision']}",
        f"peak        {known}",
        f"expected    {speed}",
    ]


def amount(value: float) -> str:
    """A number in thousands, millions and so on: ``12.3 M``."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g}"

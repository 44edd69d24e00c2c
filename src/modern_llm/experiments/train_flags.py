"""Flags of other training scripts (``--n_embd=384 --max_iters=200``) as overrides of a config."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.config.model import ALIASES
from modern_llm.errors import ConfigError
from modern_llm.registry import suggest

TRAINING = {  # theirs -> ours, below pretrain.training
    "max_iters": "max_steps",
    "learning_rate": "lr",
    "warmup_iters": "warmup",
    "grad_clip": "max_grad_norm",
    "dtype": "precision",
    "log_interval": "log_every",
    "gradient_log_interval": "grad_log_every",
    "eval_interval": "eval_every",
    "save_interval": "save_every",
}
PRECISIONS = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
DATASETS = {  # name -> source, tokenizer
    "shakespeare": ("tinyshakespeare", {"name": "bpe"}),
    "shakespeare_char": ("tinyshakespeare", {"name": "char"}),
}
OWN = ("dataset", "batch_size", "gradient_accumulation_steps")


def translate(flags: Sequence[str]) -> list[str]:
    """Every ``--key=value`` of another project as ``section.field=value``; dotted ones as they are.

    A batch there is one forward pass: ``batch_size`` times ``gradient_accumulation_steps`` is the
    batch of a step here.

    Raises:
        ConfigError: a flag that neither this project nor the table above has, or without a value.
    """
    dotted: list[str] = []
    given: dict[str, str] = {}
    for flag in flags:
        key, equals, value = flag.removeprefix("--").partition("=")
        if equals and "." in key:
            dotted.append(f"{key}={value}")
        elif not equals or not flag.startswith("--"):
            raise ConfigError(f"{flag}: write --name=value, or section.field=value")
        else:
            given[key.replace("-", "_")] = value
    return [f"{key}={value}" for key, value in _overrides(given).items()] + dotted


def _overrides(given: Mapping[str, str]) -> dict[str, str]:
    """Dotted name -> value of each flag."""
    found: dict[str, str] = {}
    model, training = set(ModelConfig.model_fields) | set(ALIASES), set(TrainingConfig.model_fields)
    unknown = []
    for key, value in given.items():
        own = TRAINING.get(key, key)
        if key in OWN:
            continue
        if key in model:
            found[f"model.{key}"] = value
        elif own in training:
            found[f"pretrain.training.{own}"] = PRECISIONS.get(value, value)
        else:
            choices = [*model, *training, *TRAINING, *OWN]
            unknown.append(f"--{key}: no such flag{suggest(key, choices)}")
    if unknown:
        raise ConfigError("\n".join(unknown))
    return found | _batch(given) | _data(given)


def _batch(given: Mapping[str, str]) -> dict[str, str]:
    rows, times = given.get("batch_size"), given.get("gradient_accumulation_steps")
    if rows is None and times is None:
        return {}
    if rows is None:
        raise ConfigError("--gradient_accumulation_steps needs --batch_size, the rows of one pass")
    try:
        step = int(rows) * int(times or 1)
    except ValueError:
        raise ConfigError(
            f"--batch_size={rows} and --gradient_accumulation_steps={times or 1} must be counts"
        ) from None
    return {
        "pretrain.training.batch_size": str(step),
        "pretrain.training.micro_batch_size": rows,
    }


def _data(given: Mapping[str, str]) -> dict[str, str]:
    name = given.get("dataset")
    if name is None:
        return {}
    source, tokenizer = DATASETS.get(name, (name, None))
    found: dict[str, Any] = {"pretrain.data": [source]}
    if tokenizer is not None:
        found["tokenizer"] = tokenizer
    return {key: json.dumps(value) for key, value in found.items()}

"""Names of other training scripts, as flags (``--n_embd=384``) or in a file, for a config of ours.

A flat file has them at its top level, without sections:

    attention_type: flash_attention
    n_embd: 384
    max_iters: 5000
    learning_rate: 3e-4
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modern_llm.config import ModelConfig, PipelineConfig, TrainingConfig
from modern_llm.config.loading import merge, presets_folder
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
MODEL_NAMES = {*ModelConfig.model_fields, *ALIASES}
TRAINING_NAMES = {*TrainingConfig.model_fields, *TRAINING}
THEIRS = MODEL_NAMES | TRAINING_NAMES | {*OWN}
SECTIONS = {*PipelineConfig.model_fields, "extends"}


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
    unknown = [f"--{key}: no such flag{suggest(key, THEIRS)}" for key in given if key not in THEIRS]
    if unknown:
        raise ConfigError("\n".join(unknown))
    found = _fields(given, mark="--").items()
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in found] + dotted


def sections(content: dict[str, Any]) -> dict[str, Any]:
    """Content of a config file whose names of other projects are put into their sections.

    A file that has none is returned as it is. Others extend ``extends`` or ``preset``, by default
    what the architecture presets share; their key/value heads are as many as their heads, unless
    they say otherwise. What is both ours and theirs (``max_steps``, ``seed``) is pretraining's.

    Raises:
        ConfigError: names that neither has, with the nearest; or a preset beside ``extends``.
    """
    flat = content.keys() - SECTIONS
    if not flat:
        return content
    unknown = [
        f"  {key}: no such name{suggest(str(key), THEIRS | SECTIONS)}"
        for key in content
        if key in flat and key not in {*THEIRS, "preset"}
    ]
    if {"preset", "extends"} <= content.keys():
        unknown.append("  preset and extends are the same; give one of them")
    if unknown:
        raise ConfigError("\n".join(unknown))
    given = {key: value for key, value in content.items() if key in THEIRS}
    own = {key: value for key, value in content.items() if key not in given and key != "preset"}
    own.setdefault("extends", content.get("preset", str(presets_folder() / "arch" / "_base.json")))
    nested: dict[str, Any] = {}
    for dotted, value in _fields(given).items():
        *path, last = dotted.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    if "n_heads" in nested.get("model", {}):
        nested["model"].setdefault("n_kv_heads", None)
    return merge(nested, own)


def _fields(given: Mapping[str, Any], *, mark: str = "") -> dict[str, Any]:
    """Dotted name -> value of each known name; ``mark`` is in front of one in a message."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key in OWN:
            continue
        if key in MODEL_NAMES:
            field = f"model.{ALIASES.get(key, key)}"
        else:
            field = f"pretrain.training.{TRAINING.get(key, key)}"
            value = PRECISIONS.get(value, value) if isinstance(value, str) else value
        if field in found:
            raise ConfigError(f"{mark}{key} is given twice, under two names; give it once")
        found[field] = value
    return found | _batch(given, mark) | _data(given)


def _batch(given: Mapping[str, Any], mark: str) -> dict[str, Any]:
    rows, times = given.get("batch_size"), given.get("gradient_accumulation_steps")
    if rows is None and times is None:
        return {}
    if rows is None:
        raise ConfigError(
            f"{mark}gradient_accumulation_steps needs {mark}batch_size, the rows of one pass"
        )
    try:
        step = int(rows) * int(times or 1)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{mark}batch_size={rows} and {mark}gradient_accumulation_steps={times or 1} must be "
            "counts"
        ) from None
    return {"pretrain.training.batch_size": step, "pretrain.training.micro_batch_size": int(rows)}


def _data(given: Mapping[str, Any]) -> dict[str, Any]:
    name = given.get("dataset")
    if name is None:
        return {}
    source, tokenizer = DATASETS.get(str(name), (name, None))
    found: dict[str, Any] = {"pretrain.data": [source]}
    if tokenizer is not None:
        found["tokenizer"] = tokenizer
    return found

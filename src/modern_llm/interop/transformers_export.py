"""Checkpoint -> folder of transformers: config, safetensors, tokenizer with its chat template.

What is published was read back by transformers first and gave the same logits and the same ids.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modern_llm.config import ModelConfig
from modern_llm.data.templates import Turn, prompt_ids
from modern_llm.data.tokenizer import ASSISTANT, BOS, EOS, PAD, USER, Tokenizer
from modern_llm.errors import CheckpointError, ConfigError
from modern_llm.interop.shapes import Shape, shape_of
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.artifacts import (
    Policy,
    published_folder,
    to_json,
    write_text,
)
from modern_llm.runtime.names import sibling_names
from modern_llm.training.checkpoint import Checkpoint, load_model_weights, read_checkpoint
from modern_llm.training.handover import model_config, read_tokenizer

TOLERANCE = 1e-5  # of the reloaded logits, relative to the largest
CHAT_TEMPLATE = (  # the same segments as modern_llm.data.templates.prompts_ids
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
_PROBE = "Tom has 3 apples,\n  buys 4 more; caf\u00e9 \u2713.\ttab"


@dataclass(frozen=True)
class Exported:
    """What `export_transformers` wrote.

    Attributes:
        folder: where it lies.
        architecture: class of transformers that reads it.
        max_difference: largest difference between the logits of the live model and those of the
            folder read back by transformers, in float32.
    """

    folder: Path
    architecture: str
    max_difference: float


def export_transformers(
    checkpoint: Path, target: Path, *, on_exists: Policy = "timestamp"
) -> Exported | None:
    """Write a checkpoint as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` read.

    Weights keep their dtype. One thing cannot travel: transformers turns a special string that a
    user types into the special id, which this package never does.

    Args:
        checkpoint: folder of a decoder's checkpoint.
        target: folder to make; appears whole or not at all.
        on_exists: when ``target`` exists: a sibling with the time in its name, nothing, or a
            backup of the old one.

    Returns:
        What was written, or ``None`` when it was skipped.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder read back differs from it.
        ConfigError: no architecture of transformers has these parts (names the fields), or the
            checkpoint is a verifier's.
        ProtectedPathError: the target cannot be written.
    """
    if on_exists == "skip" and target.exists():
        return None
    found = read_checkpoint(checkpoint)
    if any(name.startswith("trunk.") for name in found.weights):
        raise ConfigError(
            f"{checkpoint} is a verifier: transformers has no place for its score head; "
            "export the policy (sft or dpo)"
        )
    config = model_config(found)
    shape = shape_of(config)
    tokenizer = read_tokenizer(found)
    replace = on_exists == "replace"
    free = next(name for name in sibling_names(target) if replace or not name.exists())
    with published_folder(free, replace=replace) as staging:
        _write(staging, found, config, shape, tokenizer)
        difference = _check(staging, found, config, tokenizer)
    return Exported(free, shape.architecture, difference)


def _write(
    staging: Path, found: Checkpoint, config: ModelConfig, shape: Shape, tokenizer: Tokenizer
) -> None:
    weights = shape.weights(config, found.weights)
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    model_config = {**shape.config(config), **ids, "dtype": dtype, "torch_dtype": dtype}
    write_text(staging / "config.json", to_json(model_config))
    write_text(staging / "generation_config.json", to_json(ids))
    write_text(staging / "tokenizer.json", tokenizer.to_json())
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT],
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(staging / "tokenizer_config.json", to_json(tokenizer_config))


@torch.no_grad()
def _check(staging: Path, found: Checkpoint, config: ModelConfig, tokenizer: Tokenizer) -> float:
    """Read the folder back and compare; returns the largest difference of the logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported: Any = AutoModelForCausalLM.from_pretrained(
        staging, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    live = ModernDecoderLM(config)
    load_model_weights(live, found)
    live.float().eval()
    rng = torch.Generator().manual_seed(0)
    n_tokens = min(config.max_seq_len, 64)
    tokens_BT = torch.randint(0, config.vocab_size, (2, n_tokens), generator=rng)
    ours_BTV, theirs_BTV = live(tokens_BT), exported(tokens_BT).logits
    difference = float((ours_BTV - theirs_BTV).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours_BTV.abs().max())):
        raise CheckpointError(
            f"{found.folder}: transformers computes other logits from the export (by up to "
            f"{difference:.3g}); nothing was written"
        )
    reader: Any = AutoTokenizer.from_pretrained(staging, local_files_only=True)
    turns = [Turn("user", _PROBE), Turn("assistant", "7"), Turn("user", "and?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    rendered = reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    chat = reader(rendered, add_special_tokens=False)["input_ids"]
    plain = reader(_PROBE, add_special_tokens=False)["input_ids"]
    if chat != prompt_ids(tokenizer, turns) or plain != tokenizer.encode(_PROBE):
        raise CheckpointError(
            f"{found.folder}: transformers reads other ids from the export's tokenizer; "
            "nothing was written"
        )
    return difference

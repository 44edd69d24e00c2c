"""Known models as baselines, read by ``transformers`` and scored by the same harness."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from modern_llm.evaluation.scores import NotEvaluated

GPT2 = ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")
PINNED = {"gpt2": GPT2, "openai-community/gpt2": GPT2}  # name -> (repository, revision)
PROBE_S = 3.0  # how long the hub may take to answer before it counts as out of reach


class HubModel(nn.Module):
    """A causal model of transformers, called as ours is: ``model(tokens_BT, at_M=...)``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, *, at_M: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, V)``, or ``(M, V)`` at flat indices into B*T."""
        hidden = self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        if at_M is not None:
            hidden = hidden.flatten(0, 1)[at_M]
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits


class HubTokenizer:
    """A tokenizer of transformers behind the interface of ours; special ids are never typed.

    Args:
        tokenizer: fast or slow; its BOS (GPT-2: ``<|endoftext|>``) stands before each text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Baseline:
    """A loaded baseline.

    Attributes:
        name: as the user gave it.
        model: called like ours, in eval mode, float32.
        tokenizer: its own.
        context: longest input in tokens.
        n_params: trained numbers, tied ones once.
        source: repository with revision, or folder.
    """

    name: str
    model: HubModel
    tokenizer: HubTokenizer
    context: int
    n_params: int
    source: str


def load_baseline(name: str, *, device: torch.device | None = None) -> Baseline | NotEvaluated:
    """A causal model by hub name or local folder, from safetensors only; runs no code from it.

    Args:
        name: a folder with ``config.json``, ``model.safetensors`` and tokenizer files, or a hub
            name (``gpt2`` is pinned to one revision).
        device: where to put it; default CPU.

    Returns:
        The baseline, or what could not be had and why: never a number from memory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name).expanduser()
    repository, revision = PINNED.get(name, (name, None))
    if folder.is_dir():
        where: dict[str, Any] = {"local_files_only": True}
        repository, source = str(folder), str(folder)
    else:
        where = {"revision": revision, "local_files_only": not hub_reachable()}
        source = f"{repository}@{revision}" if revision else repository
    try:
        tokenizer = AutoTokenizer.from_pretrained(repository, **where)
        model, loading = AutoModelForCausalLM.from_pretrained(
            repository,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **where,
        )
    except Exception as error:  # files and code from elsewhere: they may fail in any way
        if folder.is_dir():
            hint = f"the folder cannot be read ({_first_line(error)})"
        elif where["local_files_only"]:
            hint = "the hub cannot be reached and there is no local copy; give a folder"
        else:
            hint = f"the hub does not give it ({_first_line(error)})"
        return NotEvaluated(f"baseline {name}", hint)
    for fault in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading.get(fault):  # the library fills such weights with random numbers
            told = ", ".join(sorted(map(str, loading[fault]))[:3])
            why = f"its weights are not those of its config ({fault}: {told})"
            return NotEvaluated(f"baseline {name}", why)
    context = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(context, int):
        return NotEvaluated(f"baseline {name}", "its config does not say its longest context")
    n_params = sum(parameter.numel() for parameter in model.parameters())
    wrapped = HubModel(model).to(device or torch.device("cpu")).eval()
    return Baseline(name, wrapped, HubTokenizer(tokenizer), context, n_params, source)


def hub_reachable() -> bool:
    """Whether the hub answers within three seconds; behind a proxy it is taken to.

    The library itself would try for minutes on a machine without a network.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if getproxies():
        return True
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=PROBE_S):
            return True
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""A checkpoint, its tokenizer and its template, ready to answer."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modern_llm.data.templates import Prompt, prompts_ids, truncate_prompt
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM, generate
from modern_llm.models.cost import params_by_kind
from modern_llm.models.generate import Sampling
from modern_llm.runtime.devices import autocast, check_precision, resolve_device
from modern_llm.runtime.seeding import derive_seed
from modern_llm.training.checkpoint import load_model_weights, read_checkpoint
from modern_llm.training.handover import model_config, read_tokenizer

DEFAULT_NEW_TOKENS = 128
SHORTEST_PROMPT = 4  # tokens: three markers and a token


@dataclass(frozen=True)
class Sampler:
    """How answers are drawn.

    Attributes:
        max_new_tokens: longest answer in tokens; None: 128, or half of a shorter context.
        temperature: 0 takes the likeliest token.
        top_k: keeps the k likeliest; 0 = off.
        top_p: keeps the likeliest tokens that sum to this probability; 1 = off.
        seed: of the draws.

    Raises:
        ConfigError: an option is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: without special tokens.
        n_tokens: how many were drawn, EOS not counted.
        finished: True when it ended with EOS, False when it ran out of tokens.
        first_token_s: time to the first token; see `modern_llm.models.generate.Completion`.
    """

    text: str
    n_tokens: int
    finished: bool
    first_token_s: float = field(compare=False)


@dataclass(frozen=True)
class Session:
    """A loaded model.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: of the checkpoint.
        meta: description of the checkpoint: stage, step, lineage.
        folder: the checkpoint.
        precision: of the forward.
    """

    model: ModernDecoderLM
    tokenizer: Tokenizer
    meta: dict[str, Any]
    folder: Path
    precision: str = "fp32"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    def complete(
        self, prompts: Sequence[Prompt], *, sampler: Sampler | None = None, plain: bool = False
    ) -> list[Reply]:
        """Answer each prompt; an answer depends on its prompt, its number and the seed alone.

        Args:
            prompts: questions or dialogues; a prompt that leaves no room for the answer is cut
                from its start.
            sampler: how answers are drawn.
            plain: continue the text as it is, as in pretraining, without the chat template.

        Raises:
            ConfigError: ``max_new_tokens`` fills the context.
        """
        sampler = sampler or Sampler()
        room = self.room(sampler)
        if plain:
            texts = [p for p in prompts if isinstance(p, str)]
            if len(texts) != len(prompts):
                raise ConfigError("a dialogue cannot be continued as plain text")
            rows = [[self.tokenizer.bos_id, *self.tokenizer.encode(text)] for text in texts]
            rows = [row if len(row) <= room else [row[0], *row[1 - room :]] for row in rows]
        else:
            rows = [truncate_prompt(row, room) for row in prompts_ids(self.tokenizer, prompts)]
        with decode_threads(self.device, len(rows)), autocast(self.device, self.precision):
            completions = generate(
                self.model,
                rows,
                max_new_tokens=self.new_tokens(sampler),
                temperature=sampler.temperature,
                top_k=sampler.top_k,
                top_p=sampler.top_p,
                seeds=[derive_seed(sampler.seed, i) for i in range(len(rows))],
                eos_id=self.tokenizer.eos_id,
                n_vocab=self.tokenizer.n_vocab,
            )
        return [
            Reply(
                self.tokenizer.decode(done.tokens),
                len(done.tokens),
                done.finished,
                done.first_token_s,
            )
            for done in completions
        ]

    def new_tokens(self, sampler: Sampler) -> int:
        """Longest answer in tokens.

        Raises:
            ConfigError: it leaves no room for a prompt.
        """
        context = self.model.config.max_seq_len
        wanted = sampler.max_new_tokens
        if wanted is None:
            return min(DEFAULT_NEW_TOKENS, context // 2)
        if not 1 <= wanted <= context - SHORTEST_PROMPT:
            raise ConfigError(
                f"max_new_tokens={wanted} must be from 1 to {context - SHORTEST_PROMPT}: the "
                f"model's context has {context} tokens"
            )
        return wanted

    def room(self, sampler: Sampler) -> int:
        """Tokens that a prompt may have; see `new_tokens`."""
        return self.model.config.max_seq_len - self.new_tokens(sampler)

    @property
    def continues(self) -> bool:
        """Whether it is to go on with a text as it is: nothing but pretraining has seen it."""
        return self.meta.get("stage") == "pretrain"

    def facts(self) -> dict[str, str]:
        """What the model is and what it came from, for people, as far as the checkpoint says."""
        config, meta = self.model.config, self.meta
        cost = self.model.cost(config.max_seq_len)
        active = "" if cost.active_params == cost.params else f", {cost.active_params:,} active"
        heads = f"{config.n_heads} heads ({config.n_kv_heads} key/value)"
        kinds = params_by_kind(self.model)
        parent = meta.get("parent")
        data = [
            ", ".join(dict.fromkeys(meta.get("data", ()))),
            _short("with fingerprint", "data_fingerprint", meta),
        ]
        return {
            "checkpoint": str(self.folder),
            "model": config.short_name,
            "stage": f"{meta.get('stage', '?')}, step {meta.get('step', '?')}",
            "run": f"{meta.get('run', '?')}{_short(', config', 'config_sha256', meta)}",
            "trained on": " ".join(part for part in data if part) or "?",
            "parent": f"{parent['stage']} {parent['sha256'][:12]}" if parent else "none",
            "parameters": f"{cost.params:,}{active}",
            "of these": ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()),
            "shape": f"{config.n_layers} layers, {config.d_model} wide, {heads}",
            "parts": f"{config.norm.name}, {config.position.name}, "
            f"{'moe of ' if config.moe else ''}{config.ffn.name}",
            "context": f"{config.max_seq_len} tokens",
            "vocabulary": f"{self.tokenizer.n_vocab} ids",
            "tokenizer": f"{self.tokenizer.kind}, {self.tokenizer.sha256[:12]}",
            "on disk": f"{_bytes_below(self.folder) / 1e6:,.1f} MB",
            "device": f"{self.device}, {self.precision}",
        }


def _short(told: str, key: str, meta: Mapping[str, Any]) -> str:
    """``told`` and the beginning of a hash, or nothing where there is none."""
    return f"{told} {meta[key][:12]}" if key in meta else ""


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def load_model(checkpoint: Path, *, device: str = "auto", precision: str = "fp32") -> Session:
    """Load a decoder's checkpoint; nothing in it is executed.

    Args:
        checkpoint: its folder.
        device: ``auto``, ``cpu``, ``cuda``.
        precision: of the forward: ``fp32``, ``bf16``, ``fp16``.

    Raises:
        CheckpointError: damaged, or not a checkpoint, or its description is not ours.
        ConfigError: a verifier's checkpoint; or the device or precision cannot be had.
    """
    place = resolve_device(device, field="--device")
    check_precision(precision, place, field="precision")
    found = read_checkpoint(checkpoint)
    if any(name.startswith("trunk.") for name in found.weights):
        raise ConfigError(f"{checkpoint} is a verifier, which scores answers; name a policy")
    model = ModernDecoderLM(model_config(found))
    load_model_weights(model, found)
    tokenizer = read_tokenizer(found)
    return Session(model.to(place).eval(), tokenizer, found.meta, checkpoint, precision)


@contextmanager
def decode_threads(device: torch.device, n_rows: int) -> Iterator[None]:
    """One thread while a few rows are decoded on a CPU; the number before is put back.

    Products of one token are bound by memory; more threads gain nothing on a free machine and
    wait for each other on a busy one.
    """
    before = torch.get_num_threads()
    few = device.type == "cpu" and n_rows <= 2
    if few:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if few:
            torch.set_num_threads(before)


def timed_reply(
    session: Session, prompt: Prompt, sampler: Sampler, *, plain: bool = False
) -> tuple[Reply, str]:
    """The answer to one prompt, and how fast it came, for people."""
    start = time.perf_counter()
    (reply,) = session.complete([prompt], sampler=sampler, plain=plain)
    speed = reply.n_tokens / max(time.perf_counter() - start, 1e-9)
    ending = "" if reply.finished else ", cut"
    told = f"{reply.n_tokens} tokens, {speed:.0f} tokens/s, first after {reply.first_token_s:.3f} s"
    return reply, f"({told}{ending})"

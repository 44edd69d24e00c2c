"""What an experiment came to: numbers of each seed, read from the files of its runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from modern_llm.config import check_run_name
from modern_llm.errors import DataError
from modern_llm.experiments.text import Text
from modern_llm.runtime.artifacts import Policy, to_json, write_text
from modern_llm.runtime.names import standing_siblings

FORMAT = 1
NEEDED = ("final_val_loss", "bits_per_byte", "tokens")  # numbers without which nothing compares
NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class Point:
    """One validation pass: how far training was, and the loss in nats a token."""

    step: int
    tokens: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class SeedResult:
    """One training.

    Attributes:
        seed: of weights and data order.
        run: its folder.
        sha256: of its final checkpoint.
        steps: optimizer steps.
        tokens: trained on.
        final_val_loss: nats a token over the whole validation split, after the last step.
        bits_per_byte: the same loss over the bytes of the validation text.
        train_time_s: seconds in training steps.
        epoch_time_s: seconds that one pass over the training text would take.
        tokens_per_s: trained, without the first step.
        mfu: share of the device's peak; ``None`` where that is not known.
        peak_memory_mb: allocated on a GPU, resident of the process on a CPU.
        model_size_mb: of ``model.safetensors``.
        prefill_tokens_per_s: tokens of a prompt.
        inference_tokens_per_s: tokens generated with the cache.
        first_token_s: until the first generated token; the three are ``None`` where the context is
            too short to generate.
        curve: every validation pass.
        commit: of the code that trained it, with ``+`` where it had uncommitted changes; ``None``
            where that is not known.
    """

    seed: int
    run: str
    sha256: str
    steps: int
    tokens: int
    final_val_loss: float
    bits_per_byte: float
    train_time_s: float
    epoch_time_s: float
    tokens_per_s: float
    mfu: float | None
    peak_memory_mb: float
    model_size_mb: float
    prefill_tokens_per_s: float | None
    inference_tokens_per_s: float | None
    first_token_s: float | None
    curve: tuple[Point, ...] = ()
    commit: str | None = None

    @property
    def final_val_perplexity(self) -> float:
        """Exponential of the validation loss; compares only between equal tokenizers."""
        return math.exp(min(self.final_val_loss, 700.0))


@dataclass(frozen=True)
class ExperimentResult:
    """All seeds of one experiment.

    Attributes:
        name: of the experiment.
        summary: sizes and components in one word.
        params: trained numbers.
        active_params: those that one token uses.
        flops_per_token: forward and backward.
        data: hashes and sizes of training text, validation text and tokenizer; see `Text`.
        hardware: what it was trained on, and on how many threads.
        config: what it was trained with, at its first seed.
        seeds: one training each.
        failed: seed -> why it has no result.
    """

    name: str
    summary: str
    params: int
    active_params: int
    flops_per_token: float
    data: Mapping[str, Any]
    hardware: Mapping[str, Any]
    config: Mapping[str, Any]
    seeds: tuple[SeedResult, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> value of a metric: a field of `SeedResult`, or of the experiment itself."""
        if metric == "params_millions":
            return {one.seed: self.params / 1e6 for one in self.seeds}
        if metric == "flops_per_token":
            return {one.seed: self.flops_per_token for one in self.seeds}
        if metric == "train_flops":
            return {one.seed: self.flops_per_token * one.tokens for one in self.seeds}
        found = {one.seed: getattr(one, metric) for one in self.seeds}
        return {seed: value for seed, value in found.items() if value is not None}

    def save(self, folder: Path, *, on_exists: Policy = "timestamp") -> Path:
        """Write ``<name>.json``; what stands already with the same content is left.

        Raises:
            ProtectedPathError: the folder cannot be written.
        """
        text = to_json({"format": FORMAT, **asdict(self)})
        path = folder / f"{self.name}.json"
        for standing in standing_siblings(path, suffix=".json")[:1]:
            if standing.read_text(encoding="utf-8") == text:
                return standing
        return write_text(path, text, on_exists=on_exists) or path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or of another version.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("format") != FORMAT:
                raise DataError(f"{path}: of another version of the package; run it again")
            seeds = tuple(
                SeedResult(**{**one, "curve": tuple(Point(**point) for point in one["curve"])})
                for one in value.pop("seeds")
            )
            result = cls(**value, seeds=seeds)
            check_run_name(result.name)
            Text(**result.data)
            if missing := [name for name in NEEDED for one in seeds if not getattr(one, name) > 0]:
                raise ValueError(f"no {', '.join(dict.fromkeys(missing))}")
            return result
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no result of an experiment: {error}") from None


def load_results(
    folder: Path, *, names: Sequence[str] = (), latest: int | None = None
) -> list[ExperimentResult]:
    """Results below a folder: by name (the newest of each), or those written last.

    Raises:
        DataError: there are none, or none of a name.
    """
    files = [path for path in folder.rglob("*.json") if path.parent.name == "experiments"]
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    newest: dict[str, ExperimentResult] = {}
    for path in files:
        result = ExperimentResult.load(path)
        newest.setdefault(result.name, result)
    if missing := [name for name in names if name not in newest]:
        there = ", ".join(newest) or "none"
        raise DataError(f"{folder}: no result of {', '.join(missing)} (there are: {there})")
    if not newest:
        raise DataError(f"{folder}: no results of experiments; run some first")
    return [newest[name] for name in names] if names else list(newest.values())[:latest]

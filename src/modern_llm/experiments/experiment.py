"""One architecture, trained from several seeds, and what came of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modern_llm.errors import ModernLLMError
from modern_llm.experiments.cells import Cell, run_cells, slots
from modern_llm.experiments.config import ExperimentConfig
from modern_llm.experiments.matching import cost_of
from modern_llm.experiments.results import NATS_PER_BIT, ExperimentResult, Point, SeedResult
from modern_llm.experiments.text import Text, prepare_text
from modern_llm.runtime.artifacts import Policy, sha256_json
from modern_llm.runtime.signals import stop_at_once


class ArchitectureExperiment:
    """Trains an architecture once from each seed; what is finished is not trained again.

    Args:
        config: what to train, and from which seeds.
        jobs: trainings at the same time; default: one a GPU, or as many as there are cores for.

    Raises:
        ConfigError: ``jobs`` is below 1.
    """

    def __init__(self, config: ExperimentConfig, *, jobs: int | None = None) -> None:
        self.config = config
        self.environments = slots(jobs, config.threads)

    @cached_property
    def text(self) -> Text:
        """What it is trained and scored on; tokenized on first use."""
        return prepare_text(self.config.pipeline(self.config.seeds[0]))

    @cached_property
    def cells(self) -> list[Cell]:
        """One training a seed."""
        config, steps = self.config, None
        if config.num_epochs is not None:
            training = config.pipeline(config.seeds[0]).pretrain.training
            tokens = config.num_epochs * self.text.train_tokens
            steps = math.ceil(tokens / (training.batch_size * training.seq_len))
        return [
            Cell(
                f"{config.experiment_name}-seed{seed}", config.pipeline(seed, max_steps=steps),
                config.plugins, sha256_json(asdict(self.text)),
            )
            for seed in config.seeds
        ]  # fmt: skip

    def run(self, *, on_exists: Policy = "timestamp") -> ExperimentResult:
        """Train what is missing, collect, and save below ``<output>/experiments``.

        Raises:
            ModernLLMError: no seed has a result; says why each failed.
            StoppedBySignal: a signal came; the same call goes on.
        """
        with stop_at_once():
            # The cells' names need the text: it is tokenized here, and not by every cell at once.
            failed = run_cells(self.cells, environments=self.environments)
            result = self.collect(failed)
        if not result.seeds:
            raise ModernLLMError(
                f"{result.name}: no seed has a result\n"
                + "\n".join(f"  seed {seed}: {why}" for seed, why in result.failed.items())
            )
        result.save(self.config.output / "experiments", on_exists=on_exists)
        return result

    def collect(self, failed: Mapping[str, str]) -> ExperimentResult:
        """What the files of the cells say.

        Args:
            failed: name of a cell -> why it has no result.
        """
        seeds, lost = list[SeedResult](), dict[str, str]()
        hardware: dict[str, Any] = {}
        for seed, cell in zip(self.config.seeds, self.cells, strict=True):
            if cell.finished:
                result = json.loads((cell.folder / "result.json").read_text(encoding="utf-8"))
                hardware = result["provenance"]["hardware"]
                seeds.append(self._read(seed, cell, result))
            else:
                lost[str(seed)] = failed.get(cell.name, "not trained")
        first = self.cells[0].config
        cost = cost_of(first.model, first.pretrain.training.seq_len)
        return ExperimentResult(
            name=self.config.experiment_name,
            summary=first.model.short_name,
            params=cost.params,
            active_params=cost.active_params,
            flops_per_token=cost.flops_per_token_training,
            data=asdict(self.text),
            hardware=hardware,
            config=first.model_dump(mode="json"),
            seeds=tuple(seeds),
            failed=lost,
        )

    def _read(self, seed: int, cell: Cell, result: Mapping[str, Any]) -> SeedResult:
        rows = _rows(cell.folder / "metrics.jsonl")
        passes = [row for row in rows if row["kind"] == "eval"]
        loss, units = passes[-1]["loss"], passes[-1]["units"]
        training, inference = result["training"], result["inference"] or {}
        return SeedResult(
            seed=seed,
            run=str(cell.folder.parent),
            sha256=result["checkpoint"]["sha256"],
            steps=training["steps"],
            tokens=training["tokens"],
            final_val_loss=loss,
            bits_per_byte=loss * units / (self.text.validation_bytes * NATS_PER_BIT),
            train_time_s=training["seconds"],
            epoch_time_s=training["epoch_s"],
            tokens_per_s=training["tokens_per_s"],
            mfu=training["mfu"],
            peak_memory_mb=training["peak_memory_gb"] * 1000,
            model_size_mb=result["model"]["bytes"] / 1e6,
            prefill_tokens_per_s=inference.get("prefill_tokens_per_s"),
            inference_tokens_per_s=inference.get("decode_tokens_per_s"),
            first_token_s=inference.get("first_token_s"),
            curve=_curve(rows),
            commit=_commit(result["provenance"]),
        )


def _commit(provenance: Mapping[str, Any]) -> str | None:
    """Twelve characters of the commit, and ``+`` for uncommitted changes."""
    commit: str | None = provenance["git_commit"]
    return commit and commit[:12] + ("+" if provenance["dirty"] else "")


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _curve(rows: list[dict[str, Any]]) -> tuple[Point, ...]:
    """Every validation pass; tokens and seconds in proportion between two train rows."""
    trained = [row for row in rows if row["kind"] == "train"]
    steps, tokens, seconds = (
        [0, *(row[key] for row in trained)] for key in ("step", "tokens", "time_s")
    )
    return tuple(
        Point(
            row["step"], round(np.interp(row["step"], steps, tokens)),
            float(np.interp(row["step"], steps, seconds)), row["loss"],
        )
        for row in rows
        if row["kind"] == "eval"
    )  # fmt: skip

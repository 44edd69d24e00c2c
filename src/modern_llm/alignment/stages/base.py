"""What every stage shares: where it starts from, one Trainer, result files, restart.

Stages hand over by files only. A stage that is finished is not run again, one that was stopped
goes on from its last checkpoint, and one whose parent is another than before is refused.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from modern_llm.alignment.sampling import continue_text
from modern_llm.config import ModelConfig, PipelineConfig, StageConfig
from modern_llm.data.collate import Batch
from modern_llm.data.loader import Loader
from modern_llm.data.pretraining import in_turns, stage_sources
from modern_llm.data.sources.base import RowCounts, Source
from modern_llm.data.templates import TEMPLATE_HASH
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import ProtectedPathError
from modern_llm.evaluation.scores import Result, split_results
from modern_llm.models import ModernDecoderLM, VerifierModel
from modern_llm.models.cost import Cost
from modern_llm.registry import Registry
from modern_llm.runtime.artifacts import write_json
from modern_llm.runtime.devices import check_precision, resolve_device, set_threads
from modern_llm.runtime.environment import environment, utc_now
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.ranks import group
from modern_llm.runtime.signals import leave_if_asked
from modern_llm.training.checkpoint import (
    WEIGHTS,
    Checkpoint,
    load_model_weights,
    read_checkpoint,
)
from modern_llm.training.engines import ENGINES, Engine
from modern_llm.training.handover import model_config, read_tokenizer
from modern_llm.training.objectives import Objective
from modern_llm.training.records import FirstLoss, FitResult
from modern_llm.training.run_file import write_run_file
from modern_llm.training.startup import startup_facts, tell_startup
from modern_llm.training.throughput import Work
from modern_llm.training.trainer import Trainer
from modern_llm.training.validation import mean_loss

STAGES: Registry = Registry("stage")
log = get_logger(__name__)


def load_policy(
    checkpoint: Checkpoint, device: torch.device, config: ModelConfig | None = None
) -> ModernDecoderLM:
    """The decoder of a checkpoint in eval mode.

    Args:
        checkpoint: of a policy, not of a verifier.
        device: where the model is put.
        config: what the model must be; default: what the checkpoint says.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    return build_policy(checkpoint, config).to(device).eval()


def build_policy(checkpoint: Checkpoint, config: ModelConfig | None = None) -> ModernDecoderLM:
    """As `load_policy`, in training mode and where it is made.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    model = ModernDecoderLM(config or model_config(checkpoint))
    load_model_weights(model, checkpoint)
    return model


def check_architecture(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuse a checkpoint that does not fit ``config``, or its own tokenizer; needs little memory.

    Raises:
        CheckpointError: lists what differs.
    """
    with torch.device("meta"):
        model = ModernDecoderLM(config)
    load_model_weights(model, checkpoint)
    read_tokenizer(checkpoint)


class Stage(ABC):
    """One link of the chain.

    Args:
        config: the whole run.
        run: its folder; the stage writes below ``run/<name>/``.
        parent: checkpoint that it starts from; ``None`` for pretraining and for eval.
        allow_data_change: go on with a stopped run although its data is not what it was.
    """

    name: ClassVar[str]
    starts_from: ClassVar[str | None] = None

    def __init__(
        self,
        config: PipelineConfig,
        run: Path,
        parent: Path | None,
        *,
        allow_data_change: bool = False,
    ) -> None:
        self.config = config
        self.run = run
        self.folder = run / self.name
        self.parent = read_checkpoint(parent) if parent else None
        self.allow_data_change = allow_data_change
        self.started = utc_now()

    def claim(self) -> None:
        """Record in ``stage.json`` what the stage starts from; on a restart it must be the same.

        Raises:
            ProtectedPathError: the folder holds this stage from another parent.
        """
        path = self.folder / "stage.json"
        parent = self.parent_record()
        if write_json(path, {"parent": parent}, on_exists="skip") is None:
            before = json.loads(path.read_text())["parent"]
            if (before or {}).get("sha256") != (parent or {}).get("sha256"):
                raise ProtectedPathError(
                    f"{self.folder} holds this stage from another parent checkpoint "
                    f"({(before or {}).get('path')}); give another --run-name, or --force to "
                    "start the stage again (a backup is kept)"
                )

    def outdated(self) -> bool:
        """Whether what stands was computed from other checkpoints than there are now."""
        return False

    def parent_record(self) -> dict[str, str] | None:
        """Stage, path and hash of the parent checkpoint, for lineage."""
        if self.parent is None:
            return None
        return {
            "stage": self.parent.meta["stage"],
            "path": str(self.parent.folder),
            "sha256": self.parent.sha256,
        }

    def provenance(self, *, seed: int, restarts: int = 0) -> dict[str, Any]:
        """What the stage's numbers were computed with."""
        return {
            **environment(),
            "config_sha256": self.config.sha256(),
            "seed": seed,
            "started": self.started,
            "ended": utc_now(),
            "restarts": restarts,
        }

    @abstractmethod
    def execute(self) -> None:
        """Do the stage's work and write ``result.json`` last."""


class TrainedStage(Stage):
    """A stage that trains a model: it says which data, which objective and which scores."""

    @cached_property
    def device(self) -> torch.device:
        """Device of the stage; it can compute in the wanted precision."""
        device = resolve_device(self.section.training.device)
        check_precision(self.section.training.precision, device)
        return device

    @property
    def section(self) -> StageConfig:
        """The stage's part of the config."""
        return self.config.stage(self.name)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The parent's tokenizer: it travels with the checkpoint."""
        assert self.parent is not None
        return read_tokenizer(self.parent)

    @abstractmethod
    def loader(self) -> Loader[Any]:
        """Training batches as a function of the step."""

    @abstractmethod
    def validation(self) -> Sequence[Batch]:
        """One fixed pass over held-out data."""

    @abstractmethod
    def data_records(self) -> list[dict[str, Any]]:
        """Source, split, rows, tokens, drops and fingerprint of all that was read."""

    @abstractmethod
    def objective(self) -> Objective:
        """Loss of the stage."""

    def validation_objective(self) -> Objective:
        """Loss on held-out data."""
        return self.objective()

    def build_model(self) -> nn.Module:
        """The parent's model on the CPU, in the mode that it trains in."""
        assert self.parent is not None
        return build_policy(self.parent, self.config.model)

    def fill(self, model: nn.Module) -> None:
        """Give a model that was built without memory the weights of `build_model`."""
        assert self.parent is not None
        load_model_weights(model, self.parent)

    def published(self, fit: FitResult) -> nn.Module:
        """The trained model whole, for rank 0 to score, where ranks had parts of it."""
        return load_policy(read_checkpoint(fit.checkpoint), self.device, self.config.model)

    def audit(self) -> dict[str, Any] | None:
        """Proof, made before the first step, that the data is what it should be."""
        return None

    def first_loss(self) -> FirstLoss | None:
        """What the very first loss must be."""
        return None

    def scores(self, model: Any) -> list[Result]:
        """Held-out scores of the trained model beyond the validation loss."""
        return []

    def sources(self, split: str) -> list[Source]:
        """The stage's sources; ``validation`` has its own list where the config gives one."""
        return stage_sources(self.section, self.config.data, split)

    def rows(self, split: str, counts: RowCounts | None = None) -> Iterator[dict[str, Any]]:
        """Rows of a split, the sources in turn: each has its part where not all are read."""
        return in_turns(self.sources(split), split, counts)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Mean loss and metrics of the objective over the whole validation split."""
        return mean_loss(
            model, self.validation_objective(), self.validation(),
            device=self.device, precision=self.section.training.precision,
        )  # fmt: skip

    def sample(self, model: nn.Module) -> dict[str, Any]:
        """A text that the model goes on with, for ``training.sample_every``."""
        start = next(iter(self.config.eval.completions), "")
        text = continue_text(
            decoder_of(model), self.tokenizer, start,
            max_new_tokens=self.config.eval.sample_tokens,
            precision=self.section.training.precision,
        )  # fmt: skip
        return {"prompt": start, "text": text}

    def checkpoint_meta(self) -> dict[str, Any]:
        """What travels in each checkpoint's ``config.json``, beside its step.

        Names no folder, so that the same run has the same bytes wherever it is computed.
        """
        parent = self.parent_record()
        return {
            "stage": self.name,
            "run": self.config.name,
            "model": self.config.model.model_dump(mode="json"),
            "config_sha256": self.config.sha256(),
            "plugins": self.config.plugins,
            "data": [source.name for source in self.section.data],
            "tokenizer_sha256": self.tokenizer.sha256,
            "template_sha256": TEMPLATE_HASH,
            "parent": parent and {key: parent[key] for key in ("stage", "sha256")},
        }

    def cost_of(self, model: nn.Module) -> Cost:
        """Parameters and FLOPs of a decoder or a verifier at the stage's length of rows."""
        assert isinstance(model, ModernDecoderLM | VerifierModel)
        return model.cost(self.section.training.seq_len)

    def inference(self, model: Any) -> dict[str, Any] | None:
        """How fast the trained model generates, for a stage that measures it."""
        return None

    def execute(self) -> None:
        """Train, with all ranks; score, and write ``result.json`` last."""
        parent = self.parent and str(self.parent.folder)
        order = {"stage": self.name, "run": str(self.run), "parent": parent}
        with group().ordered(order):
            fit, model, audit = self.train()
        leave_if_asked()
        if group().world_size > 1:
            model = self.published(fit)
        scores, missing = split_results(self.scores(model.eval()))
        self.write_result(fit, model, scores, missing, audit)

    def train(self) -> tuple[FitResult, nn.Module, dict[str, Any] | None]:
        """Train, as every rank does; what the others read is made by rank 0 before they do.

        Returns:
            What it came to, the model as this rank has it, and the audit (on rank 0).
        """
        training, audit = self.section.training, None
        set_threads(training.threads)
        engine: Engine = ENGINES.build(training.distributed, self.device, training.precision)
        with group().leader_first():
            if group().leads:
                audit = self.audit()
            loader, objective = self.loader(), self.objective()
            self.validation_objective(), self.validation()
        model = engine.build(self.build_model, self.fill)
        cost, startup = self.cost_of(model), None
        if group().leads:
            startup = startup_facts(
                model, self.config.model, cost, training,
                steps_per_pass=loader.steps_per_epoch, device=self.device,
            )  # fmt: skip
            tell_startup(self.name, startup)
        trainer = Trainer(
            model, objective, loader, training,
            folder=self.folder, tokenizer_json=self.tokenizer.to_json(),
            checkpoint_meta=self.checkpoint_meta(), evaluate=self.evaluate, sample=self.sample,
            work=Work.of(cost), first_loss=self.first_loss(),
            startup=startup, allow_data_change=self.allow_data_change, engine=engine,
        )  # fmt: skip
        return trainer.fit(), model, audit

    def write_result(
        self,
        fit: FitResult,
        model: nn.Module,
        scores: list[dict[str, Any]],
        missing: list[dict[str, Any]],
        audit: dict[str, Any] | None,
    ) -> None:
        """Write ``run.json``, and ``result.json``, the stage's last word."""
        cost, facts = self.cost_of(model), asdict(fit)
        checkpoint = {"path": facts.pop("checkpoint"), "sha256": facts.pop("sha256")}
        result = {
            "stage": self.name,
            "status": "finished",
            "checkpoint": checkpoint,
            "training": facts,
            "data": self.data_records(),
            "parent": self.parent_record(),
            "scores": scores,
            "inference": self.inference(model),
            "audit": audit,
            "not_evaluated": missing,
            "model": {
                "params": sum(p.numel() for p in model.parameters()),
                "active_params": cost.active_params,
                "bytes": (fit.checkpoint / WEIGHTS).stat().st_size,
                "flops_per_token": cost.flops_per_token_training,
                "summary": decoder_of(model).config.short_name,
            },
            "provenance": self.provenance(seed=self.section.training.seed, restarts=fit.restarts),
        }
        write_run_file(self.folder, config=self.config.model_dump(mode="json"), summary=result)
        path = self.folder / "result.json"
        write_json(path, {"format": 1, **result}, on_exists="skip")
        log.info("%s: finished at step %d, %s", self.name, fit.steps, path)


def decoder_of(model: nn.Module) -> ModernDecoderLM:
    """The decoder itself, or the trunk of a verifier."""
    decoder = getattr(model, "trunk", model)
    assert isinstance(decoder, ModernDecoderLM)
    return decoder

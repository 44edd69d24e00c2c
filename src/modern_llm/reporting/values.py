"""What a run folder says, as frozen values; `modern_llm.reporting.results` reads them.

Losses are in nats per unit, times in seconds, memory in GB, rates in tokens per second.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["finished", "unfinished", "damaged", "not run"]
UNITS = {"dpo": "pair"}  # what a loss is divided by where metrics.jsonl does not say


@dataclass(frozen=True)
class Score:
    """One number with its protocol (``key``), 95 % interval and the count behind it."""

    key: str
    metric: str
    value: float | None
    ci95: tuple[float, float] | None = None
    n: int | None = None
    note: str = ""


@dataclass(frozen=True)
class DataRow:
    """One source of a stage and what became of its rows."""

    source: str
    split: str
    kind: str
    rows: int | None
    tokens: int | None
    dropped: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies and the sha256 of its manifest; ``stage`` made it."""

    path: str
    sha256: str
    stage: str = ""


@dataclass(frozen=True)
class Training:
    """Totals of a finished stage."""

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    epoch_s: float | None = None
    peak_memory_gb: float | None = None
    final_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None


@dataclass(frozen=True)
class Inference:
    """How fast a stage's model generated; tokens a second are those of all rows."""

    batch_size: int | None
    prompt_tokens: int | None
    new_tokens: int | None
    precision: str
    device: str
    threads: int | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    first_token_s: float | None
    token_s: float | None


@dataclass(frozen=True)
class Provenance:
    """What a result was computed with."""

    git_commit: str = ""
    dirty: bool | None = None
    config_sha256: str = ""
    seed: int | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    ended: str = ""
    restarts: int | None = None


@dataclass(frozen=True)
class StageRun:
    """One trained stage; ``metrics`` are the rows of its metrics.jsonl."""

    name: str
    status: Status
    training: Training = Training()
    data: tuple[DataRow, ...] = ()
    parent: Checkpoint | None = None
    checkpoint: Checkpoint | None = None
    scores: tuple[Score, ...] = ()
    inference: Inference | None = None
    audit: dict[str, Any] = field(default_factory=dict)
    not_evaluated: tuple[tuple[str, str], ...] = ()
    params: int | None = None
    active_params: int | None = None
    model_bytes: int | None = None
    flops_per_token: float | None = None
    summary: str = ""
    provenance: Provenance = Provenance()
    metrics: tuple[dict[str, Any], ...] = ()
    mask_audit: str = ""

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Metric rows of one kind, in file order."""
        return [row for row in self.metrics if row.get("kind") == kind]

    @property
    def unit(self) -> str:
        """What the loss is divided by: ``token`` or ``pair``."""
        named = [row["unit"] for row in self.rows("start") if isinstance(row.get("unit"), str)]
        return named[-1] if named else UNITS.get(self.name, "token")


@dataclass(frozen=True)
class ModelEval:
    """Scores and samples of one stage's checkpoint; a sample is ``(task, prompt, text)``."""

    stage: str
    checkpoint: Checkpoint | None
    scores: tuple[Score, ...]
    samples: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Point:
    """A value with its interval; all are fractions in the reasoning curves."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Bin:
    """One bin of the reliability diagram: verifier scores in ``[lo, hi)``."""

    lo: float
    hi: float
    mean_score: float
    accuracy: float
    n: int
    ci95: tuple[float, float] | None = None  # of the accuracy, over problems


CHOICES = {  # ways to choose among n samples, and their names in tables and plots
    "majority": "majority",
    "most_likely": "most likely",
    "verifier": "verifier",
    "oracle": "oracle",
}


@dataclass(frozen=True)
class Reasoning:
    """Best-of-n of one policy; ``curves`` maps each of `CHOICES` to a point per ``n``."""

    policy: str
    n_problems: int | None
    temperature: float | None
    n: tuple[int, ...]
    pass1: Point | None
    curves: dict[str, tuple[Point, ...]]
    auroc: Score | None
    ece: Score | None
    bins: tuple[Bin, ...]
    base_rate: float | None
    scores: tuple[Score, ...] = ()
    verifier_sha256: str = ""


@dataclass(frozen=True)
class EvalRun:
    """The eval stage; ``foreign`` are stages whose scores are of another checkpoint: left out."""

    status: Status
    models: tuple[ModelEval, ...] = ()
    reasoning: Reasoning | None = None
    baselines: tuple[tuple[str, tuple[Score, ...]], ...] = ()
    not_evaluated: tuple[tuple[str, str], ...] = ()
    provenance: Provenance = Provenance()
    foreign: tuple[str, ...] = ()

    def sha256(self, stage: str) -> str:
        """Hash of what was evaluated as the checkpoint of ``stage``; empty where none is told."""
        found = {m.stage: m.checkpoint.sha256 for m in self.models if m.checkpoint}
        if self.reasoning is not None:
            found["verifier"] = self.reasoning.verifier_sha256
        return found.get(stage, "")


@dataclass(frozen=True)
class Run:
    """A whole run folder; ``faults`` says what could not be read, one sentence each."""

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, StageRun]
    evaluation: EvalRun
    faults: tuple[str, ...]

    @property
    def started(self) -> list[StageRun]:
        """Trained stages that have left anything, in order."""
        return [stage for stage in self.stages.values() if stage.status != "not run"]

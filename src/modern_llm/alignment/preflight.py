"""What can be known before compute is spent: every problem at once, and the plan of a run."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import torch

from modern_llm.alignment.stages import STAGES
from modern_llm.alignment.stages.base import check_architecture
from modern_llm.alignment.stages.evaluate import POLICIES
from modern_llm.config import (
    TRAINED_STAGES,
    DataConfig,
    PipelineConfig,
    SourceConfig,
    TrainingConfig,
)
from modern_llm.data.loader import check_sizes
from modern_llm.data.sources import open_source
from modern_llm.data.sources.hub import stay_offline_if_unreachable
from modern_llm.data.templates import MIN_PROMPT_TOKENS
from modern_llm.data.tokenizer import MIN_IDS, build_tokenizer
from modern_llm.errors import CheckpointError, ConfigError, ModernLLMError, ProtectedPathError
from modern_llm.models import ModernDecoderLM
from modern_llm.models.cost import Cost
from modern_llm.models.ffn import ACTIVATIONS, FFNS
from modern_llm.models.norms import NORMS
from modern_llm.models.positions import POSITIONS
from modern_llm.runtime.artifacts import sha256_file
from modern_llm.runtime.devices import check_precision, resolve_device
from modern_llm.runtime.environment import check_versions
from modern_llm.runtime.files import free_bytes
from modern_llm.runtime.logs import check_trackers
from modern_llm.runtime.ranks import Ranks, group
from modern_llm.training.checkpoint import MANIFEST, META, read_checkpoint, verify_checkpoint
from modern_llm.training.engines import ENGINES
from modern_llm.training.optim import build_optimizers
from modern_llm.training.schedule import Schedule
from modern_llm.training.throughput import ASSUMED_MFU, peak_flops

STATE_BYTES = 16  # a parameter's fp32 weight, gradient and two moments
WEIGHT_BYTES = 4
ANSWERED = ("instruct", "problems")
STAGE_KINDS = {"pretrain": ("text",), "sft": ANSWERED, "dpo": ("pairs",), "verifier": ("problems",)}


@dataclass(frozen=True)
class StagePlan:
    """What one trained stage takes.

    Attributes:
        tokens: tokens of all rows, padding counted.
        flops: forward and backward over all steps.
        hours: at `ASSUMED_MFU`; ``None`` where the device's peak is not known.
    """

    stage: str
    steps: int
    batch_size: int
    seq_len: int
    tokens: int
    flops: float
    hours: float | None


class Preflight:
    """Problems and plan of a run that has not begun; reads headers only, writes nothing.

    Args:
        config: the whole run.
        stages: the stages that are asked for, in order.
        checkpoint: where the first of them starts, in place of the stage before.
        standing: folder of this very run, if it ran before.
        replace: stages that stand will be run again.
        elsewhere: the run will be on another machine, whose devices are not checked.
        ranks: processes that will train together; default: those that do now.
    """

    def __init__(
        self,
        config: PipelineConfig,
        stages: Sequence[str],
        checkpoint: Path | None,
        standing: Path | None,
        *,
        replace: bool = False,
        elsewhere: bool = False,
        ranks: int | None = None,
    ) -> None:
        self.config = config
        self.stages = stages
        self.trained = [stage for stage in stages if stage in TRAINED_STAGES]
        self.checkpoint = checkpoint
        self.standing = standing
        self.replace = replace
        self.elsewhere = elsewhere
        self.ranks = group().world_size if ranks is None else ranks

    @cached_property
    def problems(self) -> list[ModernLLMError]:
        """All that is wrong, each told once."""
        found: dict[str, ModernLLMError] = {}
        for check in self._checks():
            try:
                check()
            except ModernLLMError as error:
                found.setdefault(str(error), error)
        return list(found.values())

    def raise_problems(self) -> None:
        """Raise one error that tells all problems; its kind is that of the first."""
        if self.problems:
            raise type(self.problems[0])("\n".join(map(str, self.problems)))

    @cached_property
    def cost(self) -> Cost:
        """Parameters and FLOPs of the decoder at full length, built without memory."""
        with torch.device("meta"):
            return ModernDecoderLM(self.config.model).cost(self.config.model.max_seq_len)

    def plan(self) -> list[StagePlan]:
        """Steps, tokens, FLOPs and hours of each trained stage."""
        plans = []
        for stage in self.trained:
            training = self.config.stage(stage).training
            with torch.device("meta"):
                cost = ModernDecoderLM(self.config.model).cost(training.seq_len)
            tokens = training.max_steps * training.batch_size * training.seq_len
            flops = cost.flops_per_token_training * tokens
            peak = self._peak(training.device, training.precision)
            hours = flops / (self.ranks * peak * ASSUMED_MFU) / 3600 if peak else None
            plans.append(
                StagePlan(
                    stage,
                    training.max_steps,
                    training.batch_size,
                    training.seq_len,
                    tokens,
                    flops,
                    hours,
                )
            )
        return plans

    def state_gb(self) -> float:
        """Weights, gradients and AdamW moments in GB (1e9 bytes); activations come on top."""
        return STATE_BYTES * self.cost.params / 1e9

    def disk_gb(self) -> float:
        """Checkpoints of all stages at their largest, in GB."""
        folders = sum(self.config.stage(stage).training.keep_last + 2 for stage in self.trained)
        finals = WEIGHT_BYTES * len(self.trained)
        return (folders * 3 * WEIGHT_BYTES + finals) * self.cost.params / 1e9

    @staticmethod
    def _peak(device: str, precision: str) -> float | None:
        try:
            return peak_flops(resolve_device(device), precision)
        except ConfigError:
            return None

    def _checks(self) -> Iterator[Callable[[], object]]:
        model = self.config.model
        for registry, part in ((NORMS, model.norm), (POSITIONS, model.position), (FFNS, model.ffn)):
            yield partial(registry.check, part.name, part.options)
        yield partial(ACTIVATIONS.resolve, model.activation)
        yield check_versions
        yield lambda: self.cost
        for stage in self.trained:
            training = self.config.stage(stage).training
            yield partial(_check_ranks, training, self.ranks)
            yield partial(build_optimizers, _tiny_model(), training)
            yield partial(Schedule, training)
            yield partial(check_trackers, training.trackers)
            if not self.elsewhere:
                yield partial(_check_device, "training", training.device, training.precision)
        if "eval" in self.stages and not self.elsewhere:
            tasks = self.config.eval
            yield partial(_check_device, "eval", tasks.device, tasks.precision)
        yield self._check_lengths
        yield self._check_tokenizer
        for source, split, kinds in sources_of(self.config, self.stages):
            yield partial(_check_source, source, split, kinds, self.config.data)
        yield self._check_parent
        yield self._check_lineage
        yield self._check_output

    def _check_lengths(self) -> None:
        """Prompts keep room beside what is generated or trained on."""
        config, limit = self.config, self.config.model.max_seq_len
        lengths: dict[str, int] = {}
        if "verifier" in self.stages:
            lengths["verifier.max_new_tokens"] = config.verifier.max_new_tokens
        if "eval" in self.stages:
            lengths["eval.sample_tokens"] = config.eval.sample_tokens
            for i, metric in enumerate(config.eval.text_metrics):
                lengths[f"eval.text_metrics.{i}.max_new_tokens"] = metric.max_new_tokens
            if config.eval.reasoning:
                lengths["eval.reasoning.max_new_tokens"] = config.eval.reasoning.max_new_tokens
        problems = [
            f"{name}={length} leaves no room for a prompt in model.max_seq_len={limit}"
            for name, length in lengths.items()
            if length > limit - MIN_PROMPT_TOKENS
        ]
        if "dpo" in self.stages:
            if config.dpo.max_prompt_tokens < MIN_PROMPT_TOKENS:
                problems.append(f"dpo.max_prompt_tokens: at least {MIN_PROMPT_TOKENS}, for markers")
            if config.dpo.max_answer_tokens < 2:
                problems.append("dpo.max_answer_tokens: at least 2, a token and its EOS")
        if problems:
            raise ConfigError("\n".join(problems))

    def _check_tokenizer(self) -> None:
        """The tokenizer can be had and has no more ids than the model."""
        wanted, vocab_size = self.config.tokenizer, self.config.model.vocab_size
        if "pretrain" not in self.stages or self.checkpoint is not None:
            return  # it comes with a checkpoint
        if wanted.name in ("gpt2", "file"):
            stay_offline_if_unreachable()
            build_tokenizer(wanted, vocab_size=vocab_size, texts=_no_texts, data=self.config.data)
        elif vocab_size < MIN_IDS:
            raise ConfigError(
                f"model.vocab_size={vocab_size}: tokenizer '{wanted.name}' needs {MIN_IDS} or more"
            )

    def _check_parent(self) -> None:
        """The first stage has its parent, and the parent is of the config's architecture."""
        first, path = self.stages[0], self.checkpoint
        before = STAGES[first].starts_from  # type: ignore[attr-defined]
        if path is None and before is not None:
            path = self._run / before / "final"
            if not path.exists():
                raise CheckpointError(
                    f"stage {first} starts from the {before} checkpoint, and {path} is not there; "
                    f"run --stage {before} first, or give --checkpoint PATH"
                )
        if path is not None:
            check_architecture(read_checkpoint(path), self.config.model)
        elif first == "eval" and not any((self._run / s / "final").exists() for s in POLICIES):
            raise CheckpointError(
                f"nothing to evaluate: no finished stage below {self._run}; train one first, or "
                "give --checkpoint PATH"
            )

    @property
    def _run(self) -> Path:
        """Folder of the run: the one that stands, or the one that will."""
        return self.standing or self.config.paths.output / self.config.name

    def _check_lineage(self) -> None:
        """A stage that stands already came from this run's checkpoint of the stage before."""
        if self.replace:
            return
        for before, stage in pairwise(self.stages):
            record = self._run / stage / "stage.json"
            if stage == "eval" or not record.is_file():
                continue
            parent = json.loads(record.read_text())["parent"]
            if not self._is_own(before, parent):
                raise ProtectedPathError(
                    f"{record.parent} holds this stage from another parent checkpoint "
                    f"({parent['path']}); give another --run-name, or --force to start the stages "
                    "again (backups are kept)"
                )

    def _is_own(self, stage: str, record: dict[str, str]) -> bool:
        """Whether a recorded parent is this run's checkpoint of ``stage``, or will be."""
        final, recorded = self._run / stage / "final", Path(record["path"])
        if final.exists():
            verify_checkpoint(final)
            return record["sha256"] == sha256_file(final / MANIFEST)
        try:  # the same config gives the same bits, wherever they were computed
            made = json.loads((recorded / META).read_text())
            return (made["stage"], made["config_sha256"]) == (stage, self.config.sha256())
        except (OSError, ValueError, KeyError):
            return recorded.parts[-3:] == final.parts[-3:]

    def _check_output(self) -> None:
        """All that is written can be written, and there is room for the checkpoints."""
        paths, cache = self.config.paths, self.config.data.cache_dir
        refused = []
        for path in dict.fromkeys((paths.output, paths.report, paths.ledger.parent, cache)):
            folder = _nearest(path)
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                refused.append(f"{folder} cannot be written, {path} is to be there")
        if refused:
            raise ProtectedPathError("; ".join(refused) + "; give another --output-dir")
        free_gb = free_bytes(_nearest(paths.output)) / 1e9
        needed_gb = self.disk_gb() - (0.0 if self.replace else _held_gb(self._run))
        if self.trained and free_gb < needed_gb:
            raise ProtectedPathError(
                f"{paths.output}: {free_gb:.3g} GB free, the checkpoints take up to "
                f"{needed_gb:.3g} GB; free space or give another --output-dir"
            )


def sources_of(
    config: PipelineConfig, stages: Sequence[str]
) -> Iterator[tuple[SourceConfig, str, tuple[str, ...]]]:
    """Every source with the split that is read of it, and the kinds of rows that will do."""
    for stage in (stage for stage in stages if stage in TRAINED_STAGES):
        section, kinds = config.stage(stage), STAGE_KINDS[stage]
        yield from ((source, "train", kinds) for source in section.data)
        held_out = section.data if section.validation is None else section.validation
        yield from ((source, "validation", kinds) for source in held_out)
    if "eval" in stages:
        tasks = config.eval
        yield from ((task.source, task.split, ("text",)) for task in tasks.perplexity)
        yield from ((task.source, task.split, ANSWERED) for task in tasks.text_metrics)
        if tasks.reasoning:
            yield tasks.reasoning.source, tasks.reasoning.split, ("problems",)
        if tasks.preference:
            yield tasks.preference.source, tasks.preference.split, ("pairs",)


def _held_gb(run: Path) -> float:
    """What a run that stands takes already."""
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e9


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _check_source(
    source: SourceConfig, split: str, kinds: tuple[str, ...], data: DataConfig
) -> None:
    opened = open_source(source, data)
    if opened.kind not in kinds:
        raise ConfigError(
            f"{opened.description}: rows of kind '{opened.kind}', needed here: {' or '.join(kinds)}"
        )
    opened.check(split)


def _tiny_model() -> torch.nn.Module:
    """Something with a hidden matrix, to build an optimizer over."""
    return torch.nn.ModuleList([torch.nn.Linear(1, 1)])


def _no_texts() -> Iterator[str]:
    return iter(())


def _check_ranks(training: TrainingConfig, ranks: int) -> None:
    """The engine is known, and the batch divides over the ranks."""
    ENGINES.build(training.distributed, torch.device("cpu"), training.precision)
    check_sizes(training.batch_size, training.micro_batch_size, Ranks(world_size=ranks))


def _check_device(section: str, name: str, precision: str) -> None:
    device = resolve_device(name, field=f"{section}.device")
    check_precision(precision, device, field=f"{section}.precision")

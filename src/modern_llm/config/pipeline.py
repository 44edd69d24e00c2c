"""The whole run: model, data, the five stages, evaluation, paths."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from modern_llm.config.data import DataConfig, TokenizerConfig
from modern_llm.config.model import ModelConfig
from modern_llm.config.schema import Schema, SourceConfig, count_of, given_shares
from modern_llm.config.training import TrainingConfig
from modern_llm.runtime.artifacts import sha256_json, to_json

STAGES = ("pretrain", "sft", "dpo", "verifier", "eval")
TRAINED_STAGES = STAGES[:-1]
LOGGING = ("log_every", "grad_log_every", "save_every", "keep_last", "trackers")
# What a stage does not take from the section that all share, because it would do nothing there.
NOT_SHARED = {"sft": {"doc_mask"}, "dpo": {"doc_mask", "seq_len"}, "verifier": {"doc_mask"}}


class StageConfig(Schema):
    """What every trained stage has."""

    data: list[SourceConfig] = Field(min_length=1)
    validation: list[SourceConfig] | None = None  # default: the validation split of ``data``
    training: TrainingConfig


class RowsConfig(StageConfig):
    """A stage that learns the rows of its sources."""

    max_validation_rows: PositiveInt | None = None  # rows of each validation source; None: all


class PretrainConfig(RowsConfig):
    """Next-token prediction on packed text."""

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        given_shares([source.weight for source in self.data])
        return self


class SFTConfig(RowsConfig):
    """Supervised fine-tuning on prompts and answers; only the answer and its EOS are learned."""


class DPOConfig(RowsConfig):
    """Direct preference optimisation against the frozen SFT model."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    max_prompt_tokens: PositiveInt  # default: half of model.max_seq_len
    max_answer_tokens: PositiveInt  # default: a quarter of it

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to loss=sigmoid; ipo has none")
        return self


class VerifierConfig(StageConfig):
    """A token-level scorer of solutions, trained on the policy's own graded samples."""

    n_problems: PositiveInt = 500  # training problems that the policy answers
    n_validation_problems: PositiveInt = 100
    samples_per_problem: PositiveInt = 8
    temperature: PositiveFloat = 0.7
    max_new_tokens: PositiveInt = 64
    min_wrong: float = Field(0.2, ge=0, le=0.5)  # topped up with corrupted worked solutions
    min_right: float = Field(0.2, ge=0, le=0.5)  # topped up with the worked solutions
    lm_coef: NonNegativeFloat = 0.1  # weight of the joint language-model loss


class EvalTask(Schema):
    """A split of a source that is held out, and what its scores are called."""

    source: SourceConfig
    split: Literal["validation", "test"] = "test"
    # stands for the source's name in keys
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)

    @property
    def key(self) -> str:
        """What names the data in the key of a score: ``wikitext2.test``."""
        return f"{self.name or self.source.name}.{self.split}"


class PerplexityTask(EvalTask):
    """Perplexity of held-out text, by every protocol of ``docs/evaluation.md``."""

    context: PositiveInt | None = None  # tokens; default: model.max_seq_len
    max_texts: PositiveInt | None = None


class ReasoningTask(EvalTask):
    """Exact match, pass@k, majority and best-of-n on problems with one right answer."""

    n_problems: PositiveInt = 200
    n_samples: PositiveInt = 8
    temperature: PositiveFloat = 0.7
    max_new_tokens: PositiveInt = 64


class PreferenceTask(EvalTask):
    """How often the policy prefers the chosen answer of held-out pairs."""

    max_pairs: PositiveInt = 500


class TextMetricTask(EvalTask):
    """A metric of the ``evaluate`` library on the policy's answers to held-out instructions."""

    metric: str
    max_rows: PositiveInt = 100
    max_new_tokens: PositiveInt = 64


class EvalConfig(Schema):
    """What the eval stage computes for the checkpoint of every stage."""

    perplexity: list[PerplexityTask] = Field(default_factory=list)
    reasoning: ReasoningTask | None = None
    preference: PreferenceTask | None = None
    text_metrics: list[TextMetricTask] = Field(default_factory=list)
    prompts: list[str] = Field(
        default_factory=list
    )  # answered by every stage, side by side in the report
    completions: list[str] = Field(default_factory=list)  # plain text, continued by every stage
    sample_tokens: PositiveInt = 48
    baselines: list[str] = Field(default_factory=list)  # transformers models by hub name or folder
    batch_size: PositiveInt = 32
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        """Refuse tasks whose scores would have one key: all but one of them would be lost.

        Context and limit belong to a perplexity's key, but a model's context or the split may be
        shorter: then only tasks on one source can share a key without harm.
        """
        same_key = [
            (f"perplexity.{i}", f"perplexity.{j}", a.key)
            for (i, a), (j, b) in combinations(enumerate(self.perplexity), 2)
            if a.key == b.key
            and (a.source != b.source or (a.context, a.max_texts) == (b.context, b.max_texts))
        ] + [
            (f"text_metrics.{i}", f"text_metrics.{j}", f"{a.key} {a.metric}")
            for (i, a), (j, b) in combinations(enumerate(self.text_metrics), 2)
            if (a.key, a.metric) == (b.key, b.metric)
        ]
        if same_key:
            problems = (
                f"{one} and {other} would have the same key, {key}: give one a name"
                for one, other, key in same_key
            )
            raise ValueError("\n".join(problems))
        return self


class PathsConfig(Schema):
    """Where results go, relative to the working directory."""

    output: Path = Path("experiments/runs")
    report: Path = Path("report")
    ledger: Path = Path("experiments/results/ledger.jsonl")


class PipelineConfig(Schema):
    """A whole run, resolved: every default is filled in."""

    name: str
    description: str = ""
    seed: NonNegativeInt = 0
    max_steps: PositiveInt | None = None  # caps each trained stage, for smoke runs
    rank_timeout_s: PositiveFloat = 600.0  # of several ranks: longest wait for one in a step
    plugins: dict[str, str] = Field(default_factory=dict)  # file name -> sha256 of --plugin
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    training: dict[str, Any] = Field(default_factory=dict)  # defaults of every stage's training
    pretrain: PretrainConfig
    sft: SFTConfig
    dpo: DPOConfig
    verifier: VerifierConfig
    eval: EvalConfig = EvalConfig()
    paths: PathsConfig = PathsConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_run_name(name)

    @model_validator(mode="before")
    @classmethod
    def _share_training(cls, value: Any) -> Any:
        """Fill each stage's training from the shared section, the model and the seed."""
        if not isinstance(value, dict):
            return value
        shared = value.get("training") or {}
        model = value.get("model")
        seq_len = model.get("max_seq_len") if isinstance(model, dict) else None
        cap = count_of(value.get("max_steps"))
        # What is wrong with these is told there, and not once more for every stage.
        context = count_of(seq_len) or 1
        defaults = {"seq_len": context, "seed": count_of(value.get("seed")) or 0}
        value = dict(value)
        for stage in TRAINED_STAGES:
            section = value.get(stage)
            if not (isinstance(section, dict) and isinstance(shared, dict)):
                continue
            own = section.get("training", {})
            if not isinstance(own, dict):
                continue
            unused = NOT_SHARED.get(stage, set())
            training = {k: v for k, v in {**defaults, **shared}.items() if k not in unused} | own
            if stage == "dpo":
                parts = {"max_prompt_tokens": context // 2, "max_answer_tokens": context // 4}
                section = {name: max(1, part) for name, part in parts.items()} | section
                training.setdefault("seq_len", _pair_tokens(section))
            if cap and (steps := count_of(training.get("max_steps"))):
                training["max_steps"] = min(cap, steps)
            value[stage] = {**section, "training": training}
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        checks = (self._length_problems, self._weight_problems, self._unused_problems)
        if problems := [problem for check in checks for problem in check()]:
            raise ValueError("\n".join(problems))
        return self

    def _length_problems(self) -> list[str]:
        """Rows that are longer than the context."""
        problems = [
            f"{stage}.training.seq_len={length} exceeds model.max_seq_len={self.model.max_seq_len}"
            for stage in TRAINED_STAGES
            if stage != "dpo"  # both answers of a row go on from the prompt's positions
            if (length := self.stage(stage).training.seq_len) > self.model.max_seq_len
        ]
        pair = self.dpo.max_prompt_tokens + self.dpo.max_answer_tokens
        if pair > self.model.max_seq_len:
            problems.append(
                f"dpo.max_prompt_tokens + dpo.max_answer_tokens = {pair} exceeds "
                f"model.max_seq_len={self.model.max_seq_len}"
            )
        return problems

    def _weight_problems(self) -> list[str]:
        """Weights where nothing is drawn by weight: they would do nothing."""
        sources = {
            f"{stage}.{part}.{i}": source
            for stage in TRAINED_STAGES
            for part in ("data", "validation")
            for i, source in enumerate(getattr(self.stage(stage), part) or ())
            if (stage, part) != ("pretrain", "data")
        }
        tasks = {
            **{f"eval.perplexity.{i}": task for i, task in enumerate(self.eval.perplexity)},
            **{f"eval.text_metrics.{i}": task for i, task in enumerate(self.eval.text_metrics)},
            **{"eval.reasoning": self.eval.reasoning, "eval.preference": self.eval.preference},
        }
        sources |= {f"{place}.source": task.source for place, task in tasks.items() if task}
        return [
            f"{place}: weight={source.weight} has no effect here; only sources of pretrain.data "
            "are drawn by weight, all others in proportion to their size"
            for place, source in sources.items()
            if source.weight is not None
        ]

    def _unused_problems(self) -> list[str]:
        """Fields of ``training`` that would do nothing in their stage."""
        problems = [
            f"{stage}.training.doc_mask=true has no effect here: only pretrain joins documents "
            "in a row (sft always keeps its examples apart)"
            for stage in NOT_SHARED
            if self.stage(stage).training.doc_mask
        ]
        given, row = self.dpo.training.seq_len, _pair_tokens(vars(self.dpo))
        if given != row:
            problems.append(
                f"dpo.training.seq_len={given} has no effect here: a row has max_prompt_tokens + "
                f"2 * max_answer_tokens = {row}; leave it out"
            )
        return problems

    def stage(self, name: str) -> StageConfig:
        """Section of a trained stage."""
        section: StageConfig = getattr(self, name)
        return section

    def __str__(self) -> str:
        return to_json(self.model_dump(mode="json")).rstrip()

    def sha256(self) -> str:
        """Hash of all that can change a number; names, places and logging are left out."""
        return config_sha256(self.model_dump(mode="json"))


def config_sha256(config: Mapping[str, Any]) -> str:
    """`PipelineConfig.sha256` of a resolved config as ``config.json`` has it.

    A later version has more fields, so the file's own are what an earlier run's hash was made of.
    """
    neutral = ("name", "description", "paths", "training", "rank_timeout_s")
    value = {key: section for key, section in config.items() if key not in neutral}
    value["data"] = {k: v for k, v in value["data"].items() if k not in ("root", "cache_dir")}
    for stage in TRAINED_STAGES:
        training = {k: v for k, v in value[stage]["training"].items() if k not in LOGGING}
        if "distributed" in training:  # changes no number beyond rounding
            training["distributed"] = "none"
        value[stage] = {**value[stage], "training": training}
    return sha256_json(value)


def _pair_tokens(section: Mapping[str, Any]) -> int:
    """Tokens of DPO's longest row, a prompt and both answers, before or after validation."""
    prompt, answer = (
        count_of(section[name]) or 1 for name in ("max_prompt_tokens", "max_answer_tokens")
    )
    return prompt + 2 * answer


def check_run_name(name: str) -> str:
    """Return ``name`` when it can be one folder's name.

    Raises:
        ValueError: it holds anything but letters, digits, ``.``, ``_`` and ``-``.
    """
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= 100):
        raise ValueError(
            f"run name {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter "
            "or digit, at most 100"
        )
    return name

"""Checkpoints side by side on the same held-out tasks, with paired differences where they exist."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modern_llm.alignment.precision import concrete
from modern_llm.alignment.preflight import Preflight
from modern_llm.alignment.stages.base import load_policy
from modern_llm.alignment.suite import Suite
from modern_llm.config import PipelineConfig
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import ConfigError, ModernLLMError
from modern_llm.evaluation.baselines import load_baseline
from modern_llm.evaluation.compare import Contestant, compare
from modern_llm.evaluation.scores import NotEvaluated, split_results
from modern_llm.evaluation.wikitext import detokenize
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.artifacts import Policy, write_json
from modern_llm.runtime.devices import set_threads
from modern_llm.runtime.environment import environment
from modern_llm.training.checkpoint import read_checkpoint
from modern_llm.training.handover import read_tokenizer


def comparison_path(config: PipelineConfig) -> Path:
    """Where the comparison of a config is written."""
    return config.paths.output / f"{config.name}-comparison" / "comparison.json"


def compare_checkpoints(
    config: PipelineConfig,
    checkpoints: Sequence[Path],
    *,
    baselines: Sequence[str] = (),
    on_exists: Policy = "timestamp",
) -> Path | None:
    """Evaluate policies with the config's tasks, print a table, write ``comparison.json``.

    All that can be known is checked before the first model is evaluated.

    Args:
        config: its ``eval`` section says which tasks; its name is that of the result.
        checkpoints: the first is what the others are compared with.
        baselines: transformers models, scored on text only.
        on_exists: policy for the result file.

    Returns:
        The result, or ``None`` when it stands already and the policy is to skip.

    Raises:
        CheckpointError: a checkpoint is damaged or no policy.
        ConfigError: a model is named twice, or a task does not fit a checkpoint.
        DataError: the data of a task cannot be had.
    """
    names = [str(path) for path in checkpoints]
    _check_names(names, baselines)
    target = comparison_path(config)
    if on_exists == "skip" and target.exists():
        return None
    config = concrete(config)
    set_threads(config.eval.threads)
    suite = Suite(config)
    policies = [_policy(suite, path) for path in checkpoints]
    contestants: list[Contestant] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    missing: list[dict[str, Any]] = []
    for name, (model, tokenizer) in zip(names, policies, strict=True):
        rows[name], absent = split_results(suite.evaluate(model, tokenizer).results)
        missing += absent
        contestants.append(Contestant(name, model, tokenizer, model.config.max_seq_len))
    for name in baselines:
        found = load_baseline(name, device=suite.compute.device)
        if isinstance(found, NotEvaluated):
            missing += split_results([found])[1]
            continue
        scores = suite.perplexity(found.model, found.tokenizer, found.context)
        rows[name], absent = split_results(scores)
        contestants.append(Contestant(name, found.model, found.tokenizer, found.context))
    differences = _differences(suite, contestants)
    _print(rows, differences, missing)
    result = {
        "format": 1,
        "checkpoints": names,
        "scores": rows,
        "differences": differences,
        "not_evaluated": missing,
        "provenance": {**environment(), "config_sha256": config.sha256()},
    }
    return write_json(target, result, on_exists=on_exists)


def _check_names(checkpoints: Sequence[str], baselines: Sequence[str]) -> None:
    """Names are those of the results: each can stand for one model."""
    if len(set(checkpoints)) != len(checkpoints):
        raise ConfigError("--checkpoints names one folder twice")
    if len({*checkpoints, *baselines}) != len(checkpoints) + len(baselines):
        raise ConfigError("--baseline names one model twice")


def _policy(suite: Suite, path: Path) -> tuple[ModernDecoderLM, Tokenizer]:
    """A checkpoint's model and tokenizer, once all tasks are known to fit it."""
    checkpoint = read_checkpoint(path)
    model = load_policy(checkpoint, suite.compute.device)
    own = suite.config.model_copy(update={"model": model.config})
    try:
        Preflight(own, ["eval"], path, None).raise_problems()
    except ModernLLMError as error:
        raise type(error)(f"{path}: {error}") from None
    return model, read_tokenizer(checkpoint)


def _differences(suite: Suite, contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Bits per byte against the first contestant on the same documents, with a verdict."""
    found: list[dict[str, Any]] = []
    if len(contestants) < 2:
        return found
    for task in suite.tasks.perplexity:
        key, task_rows = suite.read(task, task.max_texts)
        texts = [row["text"] for row in task_rows]
        wikitext = task.source.name.startswith("wikitext")
        result = compare(
            contestants, texts, key=key, context=task.context,
            compute=suite.compute, detokenize=detokenize if wikitext else None,
        )  # fmt: skip
        for name, score in result.differences.items():
            scores, _ = split_results([score])
            found.append({"name": name, "verdict": result.verdicts[name], **scores[0]})
    return found


def _print(
    rows: dict[str, list[dict[str, Any]]],
    differences: list[dict[str, Any]],
    missing: list[dict[str, Any]],
) -> None:
    out = Console(file=sys.stdout, highlight=False)
    table = Table("score", *rows)
    keys = dict.fromkeys((s["key"], s["metric"]) for scores in rows.values() for s in scores)
    for key, metric in keys:
        cells = []
        for scores in rows.values():
            score = next((s for s in scores if (s["key"], s["metric"]) == (key, metric)), None)
            cells.append("-" if score is None else _cell(score))
        table.add_row(f"{key} {metric}", *cells)
    out.print(table)
    for row in differences:
        told = f"{row['name']}: {row['verdict']} than the first"
        out.print(f"{told}, {row['key']}: {_cell(row)} bits per byte", markup=False)
    for row in missing:
        out.print(f"not evaluated: {row['what']}: {row['why']}", markup=False)


def _cell(score: dict[str, Any]) -> str:
    interval = score["ci95"]
    ends = "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"
    return f"{score['value']:.4g}{ends} (n={score['n']})"

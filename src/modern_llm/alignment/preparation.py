"""Fetch and tokenize ahead of training all that a run will read, so that it needs no network."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from modern_llm.alignment.preflight import sources_of
from modern_llm.alignment.stages.dpo import DPOStage
from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.alignment.stages.sft import SFTStage
from modern_llm.alignment.suite import preference_store
from modern_llm.config import PipelineConfig
from modern_llm.data.making import Making, making
from modern_llm.data.sources import open_source
from modern_llm.data.sources.hub import stay_offline_if_unreachable
from modern_llm.data.store import TokenStore
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import DataError
from modern_llm.evaluation.baselines import load_baseline
from modern_llm.evaluation.scores import NotEvaluated
from modern_llm.evaluation.text_metrics import load_metric
from modern_llm.runtime.artifacts import sha256_json
from modern_llm.runtime.logs import get_logger

log = get_logger(__name__)
Part = tuple[str, Callable[[], object]]  # what it is, and how it is had


def prepare_data(config: PipelineConfig, stages: Sequence[str], *, jobs: int) -> int:
    """Have all that stages read on this disk: sources, tokenizer, token stores, baselines.

    What stands is read once and left; what is damaged is set aside and made anew.

    Args:
        config: of the run.
        stages: those that are prepared for.
        jobs: processes that encode.

    Returns:
        The number of parts, all of which are there.

    Raises:
        DataError: parts cannot be had; names each of them, after all others were made.
    """
    stay_offline_if_unreachable()
    with making(Making(jobs=jobs, repair=True, verify=True)):
        return _go_through(config, stages)


def check_data(config: PipelineConfig, stages: Sequence[str], *, way_out: str) -> int:
    """Look whether all that stages read is on this disk, whole; reads every byte, makes nothing.

    Args:
        config: of the run.
        stages: those that are looked at.
        way_out: command that has what is missing, for the error.

    Returns:
        The number of parts.

    Raises:
        DataError: names every part that is missing or damaged.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's libraries are imported
    try:
        with making(Making(build=False, verify=True)):
            return _go_through(config, stages)
    except DataError as error:
        raise DataError(f"{error}\nthis fetches and makes it: {way_out}") from None


def _go_through(config: PipelineConfig, stages: Sequence[str]) -> int:
    """Ask for every part; the errors of all of them are one."""
    problems: list[str] = []
    number = 0
    for name, have in _parts(config, stages):
        number += 1
        try:
            have()
        except DataError as error:
            problems.append(f"{name}: {error}")
        else:
            log.info("%s: ready", name)
    if problems:
        raise DataError("\n".join(problems))
    return number


def _parts(config: PipelineConfig, stages: Sequence[str]) -> Iterator[Part]:
    """Everything that stages read, in an order in which it can be made."""
    sources = {
        sha256_json([source.name, source.options, split]): (source, split)
        for source, split, _ in sources_of(config, stages)
    }
    for source, split in sources.values():
        opened = open_source(source, config.data)
        yield f"source {opened.description}, {split} split", partial(opened.fetch, split)
    if "eval" in stages:
        for name in config.eval.baselines:
            yield f"baseline {name}", partial(_have, partial(load_baseline, name))
        for metric in dict.fromkeys(task.metric for task in config.eval.text_metrics):
            load = partial(load_metric, metric, f"metric {metric}")
            yield f"metric {metric}", partial(_have, load)
    pretrain = PretrainStage(config, config.paths.output / config.name, None)
    yield f"tokenizer {config.tokenizer.name}", lambda: pretrain.tokenizer
    try:
        tokenizer = pretrain.tokenizer
    except DataError:
        return  # told; without it no text can be encoded
    for stage in stages:
        if stage in STORES:
            yield from STORES[stage](config, tokenizer)


def _pretrain(config: PipelineConfig, tokenizer: Tokenizer) -> Iterator[Part]:
    stage = PretrainStage(config, config.paths.output / config.name, None)
    stage.tokenizer = tokenizer
    yield "pretrain, tokens to train on", lambda: _tell(*stage.stores)
    yield "pretrain, tokens to validate on", lambda: _tell(stage.validation_store)


def _sft(config: PipelineConfig, tokenizer: Tokenizer) -> Iterator[Part]:
    stage = SFTStage(config, config.paths.output / config.name, None)
    stage.tokenizer = tokenizer  # in a run the parent checkpoint has brought the same one
    yield "sft, tokens to train on", lambda: _tell(stage.store)
    yield "sft, tokens to validate on", lambda: _tell(stage.validation_store)
    if config.data.replay:
        yield "sft, tokens to replay", lambda: _tell(*filter(None, [stage.replay]))


def _dpo(config: PipelineConfig, tokenizer: Tokenizer) -> Iterator[Part]:
    stage = DPOStage(config, config.paths.output / config.name, None)
    stage.tokenizer = tokenizer
    yield "dpo, tokens to train on", lambda: _tell(stage.store)
    yield "dpo, tokens to validate on", lambda: _tell(stage.validation_store)


def _eval(config: PipelineConfig, tokenizer: Tokenizer) -> Iterator[Part]:
    if (task := config.eval.preference) is not None:
        yield "eval, tokens of pairs", lambda: _tell(preference_store(config, task, tokenizer))


# The verifier's text is sampled by the policy; it reads its problems from their source.
STORES = {"pretrain": _pretrain, "sft": _sft, "dpo": _dpo, "eval": _eval}


def _tell(*stores: TokenStore) -> None:
    """Say what stores hold."""
    for row in (row for store in stores for row in store.sources):
        log.info(
            "%s %s: %s rows, %s tokens", row["source"], row["split"], row["rows"], row["tokens"]
        )


def _have(load: Callable[[], object]) -> None:
    """Load something of the hub once, which keeps it in the hub's cache.

    Raises:
        DataError: it cannot be had.
    """
    if isinstance(found := load(), NotEvaluated):
        raise DataError(found.why)

"""The study: models trained or given, each arm measured once, one result from all of them.

Everything finished is found again by what decided it, so a study that was stopped goes on: a run
by the hash of its config, a measured arm by its checkpoint, its texts and what its cache keeps.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modern_llm.config import ModelConfig, PipelineConfig
from modern_llm.data.pretraining import new_tokenizer, validation_store
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import CheckpointError, ConfigError, DataError, ModernLLMError
from modern_llm.evaluation.intervals import Floats
from modern_llm.experiments.cells import Cell, cores, run_cells, slots
from modern_llm.experiments.sinks.arms import (
    TRAINED,
    Arm,
    arms_of,
    check_model,
    kind_of,
    stretched,
)
from modern_llm.experiments.sinks.measure import FORMAT, measure
from modern_llm.experiments.sinks.scores import bin_edges, by_context, differences, summary
from modern_llm.experiments.text import prepare_text
from modern_llm.models import ModernDecoderLM
from modern_llm.reporting.sinks import write_sinks_report
from modern_llm.runtime.artifacts import Policy, sha256_json, write_json
from modern_llm.runtime.devices import resolve_device, set_threads
from modern_llm.runtime.environment import environment
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.names import standing_siblings
from modern_llm.training.checkpoint import Checkpoint, load_model_weights, read_checkpoint
from modern_llm.training.handover import model_config, read_tokenizer

log = get_logger(__name__)

REFERENCE = "full/sinks"  # what other arms are compared with, position by position
COMPARED = (  # in the last context, paired
    ("full/recent", "full/sinks"),
    ("full/all", "full/sinks"),
    ("window/recent", "full/sinks"),
    ("window-learned/recent", "window/recent"),
)


@dataclass(frozen=True)
class Study:
    """What is asked.

    Attributes:
        config: model (with the window), data and training; its name is that of the study.
        contexts: length of the texts in contexts.
        n_sinks: first tokens that streaming sinks keep.
        n_texts: texts at most.
        seeds: of the trained models.
        checkpoints: models to be read in place of trained ones; those of one kind are its seeds.
        plugins: files that register components.
        command: as it was given, for the report.
        on_exists: policy for the result.
    """

    config: PipelineConfig
    contexts: int = 8
    n_sinks: int = 4
    n_texts: int = 64
    seeds: tuple[int, ...] = (0,)
    checkpoints: tuple[Path, ...] = ()
    plugins: tuple[Path, ...] = ()
    command: str = ""
    on_exists: Policy = "timestamp"

    @property
    def folder(self) -> Path:
        """Where all of it is written."""
        return self.config.paths.output / self.config.name

    @property
    def window(self) -> int:
        """Keys that bounded caches hold."""
        assert self.config.model.window is not None  # checked first
        return self.config.model.window


@dataclass(frozen=True)
class Found:
    """A model of the study: its checkpoint, kind, and which seed of the kind it is."""

    checkpoint: Checkpoint
    config: ModelConfig
    seed: int

    @property
    def kind(self) -> str:
        """See `kind_of`."""
        return kind_of(self.config)


def run_study(study: Study) -> tuple[Path, Path] | None:
    """Train what is not given, measure every arm, write ``result.json`` and the report.

    Returns:
        Result and report, old where nothing is new; ``None`` when a result stands and is to be
        left alone.

    Raises:
        ConfigError: numbers that do not fit each other, or a model that cannot be read so far.
        DataError: the held-out text is too short.
        CheckpointError: a checkpoint is damaged, or the given ones differ in tokenizer or context.
    """
    target = study.folder / "result.json"
    if study.on_exists == "skip" and target.exists():
        return None
    _check_numbers(study)
    set_threads(study.config.eval.threads)
    models = _given(study) if study.checkpoints else _trained(study)
    tokenizer = read_tokenizer(models[0].checkpoint)
    texts_NT, source = _texts(study, tokenizer, models[0].config.max_seq_len)
    measured = {
        (arm.name, found.seed): _measured(study, found, arm, texts_NT, tokenizer, source)
        for found in models
        for arm in arms_of(found.config, window=study.window, n_sinks=study.n_sinks)
    }
    result = _result(study, models, measured, source, len(texts_NT))
    written = next(iter(standing_siblings(target, suffix=".json")), None)
    if written is None or study.on_exists == "replace" or _key_in(written) != result["key"]:
        written = write_json(target, result, on_exists=study.on_exists) or target
    return written, write_sinks_report(
        written, study.config.paths.report, on_exists=study.on_exists
    )


def _check_numbers(study: Study) -> None:
    model, problems = study.config.model, []
    if model.window is None:
        problems.append("model.window says how many keys a bounded cache holds: give it")
    elif not 1 <= study.n_sinks < model.window:
        problems.append(
            f"--n-sinks {study.n_sinks}: from 1 to {model.window - 1}, since sinks and recent "
            f"tokens share the window of {model.window}"
        )
    if study.contexts < 2:
        problems.append(f"--contexts {study.contexts}: at least 2, to see what is beyond one")
    if not study.seeds:
        problems.append("--seeds 0: at least 1")
    if problems:
        raise ConfigError("; ".join(problems))


def cell_of(study: Study, kind: str, seed: int, *, text: str) -> Cell:
    """The training of one model: the study's config with the kind's attention, and its seed."""
    raw: dict[str, Any] = study.config.model_dump(mode="json")
    raw["model"] |= TRAINED[kind]
    raw["seed"] = raw["pretrain"]["training"]["seed"] = seed
    raw["paths"]["output"] = str(study.folder / "runs")
    config = PipelineConfig.model_validate(raw)
    return Cell(f"{kind}-seed{seed}", config, study.plugins, text)


def _trained(study: Study) -> list[Found]:
    """Each kind with each seed, trained here unless it was; what cannot work is told before."""
    config = study.config
    n_tokens = study.contexts * config.model.max_seq_len
    text = sha256_json(asdict(prepare_text(config)))
    cells = {
        seed: [cell_of(study, kind, seed, text=text) for kind in TRAINED] for seed in study.seeds
    }
    every = [cell for turn in cells.values() for cell in turn]
    for cell in every:
        check_model(cell.config.model, "this config", window=study.window, n_tokens=n_tokens)
    _texts(study, new_tokenizer(config), config.model.max_seq_len)
    threads = config.pretrain.training.threads or cores()
    if failed := run_cells(every, environments=slots(None, threads)):
        lines = (f"{name}: {why}" for name, why in failed.items())
        raise ModernLLMError("\n".join(["not every model of the study could be trained", *lines]))
    return [
        Found(read_checkpoint(cell.folder / "final"), cell.config.model, study.seeds.index(seed))
        for seed, turn in cells.items()
        for cell in turn
    ]


def _given(study: Study) -> list[Found]:
    """The given checkpoints; those of one kind are counted as its seeds."""
    found: list[Found] = []
    counts: dict[str, int] = {}
    for folder in study.checkpoints:
        checkpoint = read_checkpoint(folder)
        config = model_config(checkpoint)
        n_tokens = study.contexts * config.max_seq_len
        check_model(config, str(folder), window=study.window, n_tokens=n_tokens)
        kind = kind_of(config)
        found.append(Found(checkpoint, config, counts.get(kind, 0)))
        counts[kind] = counts.get(kind, 0) + 1
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{n} of {kind}" for kind, n in counts.items())
        raise ConfigError(f"--checkpoints: those of one kind are its seeds, as many each: {told}")
    _check_alike(found)
    return found


def _check_alike(found: Sequence[Found]) -> None:
    """Refuse checkpoints whose losses by position cannot be compared."""
    first, *others = found
    for other in others:
        folders = f"{first.checkpoint.folder} and {other.checkpoint.folder}"
        if other.checkpoint.sha256 == first.checkpoint.sha256:
            raise CheckpointError(f"{folders} are the same checkpoint; name it once")
        if read_tokenizer(other.checkpoint).sha256 != read_tokenizer(first.checkpoint).sha256:
            raise CheckpointError(
                f"{folders} have different tokenizers: their losses per token do not compare"
            )
        if other.config.max_seq_len != first.config.max_seq_len:
            raise CheckpointError(
                f"{folders} have contexts of {other.config.max_seq_len} and "
                f"{first.config.max_seq_len} tokens; the study needs one"
            )


def _texts(study: Study, tokenizer: Tokenizer, context: int) -> tuple[Tensor, dict[str, Any]]:
    """Stretches of held-out text, ``(N, contexts * T + 1)``, and where they are from.

    Consecutive, without overlap, as training has its blocks: documents follow each other.

    Raises:
        DataError: there are not two.
    """
    store = validation_store(study.config, tokenizer)
    length = study.contexts * context
    n_texts = min(study.n_texts, (store.n_tokens - 1) // length)
    names = ", ".join(row["source"] for row in store.sources)
    if n_texts < 2:
        raise DataError(
            f"{names}: {store.n_tokens} held-out tokens are too few for two texts of "
            f"{study.contexts} contexts ({2 * length + 1} tokens); give fewer --contexts or more "
            "text (pretrain.data, pretrain.max_validation_rows)"
        )
    rows = [store.tokens[i * length : (i + 1) * length + 1] for i in range(n_texts)]
    texts_NT = torch.from_numpy(np.stack(rows).astype(np.int64))
    return texts_NT, {"source": names, "sha256": sha256_json(texts_NT.tolist())}


def _measured(
    study: Study,
    found: Found,
    arm: Arm,
    texts_NT: Tensor,
    tokenizer: Tokenizer,
    source: dict[str, Any],
) -> dict[str, Any]:
    """The file of an arm: read where it stands, else measured and written."""
    device = resolve_device(study.config.eval.device, field="eval.device")
    key = sha256_json(
        [FORMAT, found.checkpoint.sha256, arm.name, arm.capacity, arm.n_sinks, study.n_sinks,
         source["sha256"], study.contexts, str(device)]
    )  # fmt: skip
    path = study.folder / "arms" / f"{arm.name.replace('/', '-')}-{key[:12]}.json"
    if path.exists() and study.on_exists != "replace":
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored
    log.info("%s: seed %d, %s", study.config.name, found.seed, arm.label)
    model = ModernDecoderLM(stretched(found.config, texts_NT.shape[1] - 1))
    load_model_weights(model, found.checkpoint)
    row = {
        "key": key,
        **measure(
            model.to(device).eval(), arm, texts_NT.to(device), tokenizer,
            context=found.config.max_seq_len, n_first=study.n_sinks,
        ),
    }  # fmt: skip
    write_json(path, row, on_exists="replace")
    return row


def _result(
    study: Study,
    models: Sequence[Found],
    measured: dict[tuple[str, int], dict[str, Any]],
    source: dict[str, Any],
    n_texts: int,
) -> dict[str, Any]:
    """All that the report tells."""
    context = models[0].config.max_seq_len
    edges = bin_edges(context, study.contexts)
    names = list(dict.fromkeys(name for name, _ in measured))
    seeds = {name: [row for (n, _), row in measured.items() if n == name] for name in names}
    means: dict[str, Floats] = {
        name: np.array([row["bin_nats"] for row in rows]) for name, rows in seeds.items()
    }
    last = {name: by_context(x, edges, context)[:, :, -1] for name, x in means.items()}
    reference = REFERENCE if REFERENCE in means else names[0]
    per_seed = max(map(len, seeds.values()))
    resampled = f"bootstrap over {n_texts} texts"
    if per_seed > 1:
        resampled += f" and {per_seed} seeds (crossed; few seeds make it too narrow)"
    return {
        "format": FORMAT,
        "name": study.config.name,
        "command": study.command,
        "key": sha256_json([row["key"] for row in measured.values()]),
        "context": context,
        "contexts": study.contexts,
        "window": study.window,
        "n_sinks": study.n_sinks,
        "n_seeds": per_seed,
        "texts": {**source, "n": n_texts, "tokens": edges[-1]},
        "interval": resampled,
        "reference": reference,
        "models": [_about(found) for found in models],
        "arms": [
            {**{k: v for k, v in rows[0].items() if k not in ("bin_nats", "key")}, "name": name,
             **summary(
                 means[name], means[reference], edges, context=context, window=study.window
             )}
            for name, rows in seeds.items()
        ],
        "differences": differences(last, COMPARED),
        "provenance": {**environment(), "config_sha256": study.config.sha256()},
    }  # fmt: skip


def _about(found: Found) -> dict[str, Any]:
    meta = found.checkpoint.meta
    return {
        "kind": found.kind,
        "seed": found.seed,
        "checkpoint": str(found.checkpoint.folder),
        "sha256": found.checkpoint.sha256,
        "step": meta.get("step"),
        "summary": found.config.short_name,
        "params": sum(x.numel() for x in found.checkpoint.weights.values()),
    }


def _key_in(path: Path) -> str | None:
    try:
        key: str | None = json.loads(path.read_text()).get("key")
    except (OSError, ValueError, AttributeError):
        return None
    return key

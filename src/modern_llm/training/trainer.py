"""One training loop for every stage; a stage brings a model, batches and an objective."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.data.loader import Loader
from modern_llm.errors import DataError, DivergedError, StoppedBySignal
from modern_llm.runtime.artifacts import JsonLines, sha256_json
from modern_llm.runtime.devices import (
    check_precision,
    keep_freed_memory,
    memory_row,
    peak_memory_gb,
    resolve_device,
    resolve_precision,
)
from modern_llm.runtime.logs import get_logger
from modern_llm.runtime.ranks import group
from modern_llm.runtime.seeding import rng_state, seed_rank, set_rng_state
from modern_llm.runtime.signals import StopSignal
from modern_llm.training.checkpoint import load_model_weights, read_checkpoint, write_checkpoint
from modern_llm.training.engines import Engine, OneProcess
from modern_llm.training.objectives import Objective
from modern_llm.training.progress import RunLog, ranks_row, train_row
from modern_llm.training.records import (
    FirstLoss,
    FitResult,
    Progress,
    StepStats,
    fit_result,
    perplexity,
)
from modern_llm.training.retention import (
    checkpoint_path,
    standing_final,
    to_go_on_from,
)
from modern_llm.training.saving import Saver
from modern_llm.training.throughput import Work, peak_flops
from modern_llm.training.update import Update
from modern_llm.training.validation import Hook, aside

log = get_logger(__name__)


class Trainer:
    """Trains a model on a loader's batches and survives what interrupts it.

    The model trains in the mode it comes in: ``eval()`` it first for a stage without dropout.

    Args:
        model: fresh, or with the weights of the stage before; moved to the config's device.
            Several ranks train it in the way that ``engine`` made it.
        objective: loss of the stage.
        loader: batches of each step.
        config: how to optimise.
        folder: of the stage; receives ``metrics.jsonl``, ``checkpoints/`` and ``final/``.
        tokenizer_json: travels with every checkpoint.
        checkpoint_meta: what every checkpoint says of itself: stage, model config, hashes.
        evaluate: one fixed pass over held-out data; its ``loss`` ranks checkpoints.
        sample: generated text to look at, as one row.
        work: FLOPs of a token, for TFLOP/s and MFU; ``None``: neither is told.
        first_loss: what the loss of the very first step must be.
        startup: what the stage told before it began, for the record (`startup`).
        resume: go on from the newest good checkpoint; ``False`` refuses a folder that has one.
        allow_data_change: go on although the data is not what it was.
        engine: how the model lies on the ranks; default: one process has all.

    Raises:
        ConfigError: device, precision, optimizer or schedule cannot be had.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        loader: Loader[Any],
        config: TrainingConfig,
        *,
        folder: Path,
        tokenizer_json: str,
        checkpoint_meta: Mapping[str, Any],
        evaluate: Hook | None = None,
        sample: Hook | None = None,
        work: Work | None = None,
        first_loss: FirstLoss | None = None,
        startup: Mapping[str, Any] | None = None,
        resume: bool = True,
        allow_data_change: bool = False,
        engine: Engine | None = None,
    ) -> None:
        self.device = resolve_device(config.device)
        keep_freed_memory()
        precision = resolve_precision(config.precision, self.device)
        check_precision(precision, self.device)
        config = config.model_copy(update={"precision": precision})
        self.model = model.to(self.device)
        self.objective, self.loader, self.config = objective, loader, config
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.tokenizer_json, self.checkpoint_meta = tokenizer_json, dict(checkpoint_meta)
        self.evaluate, self.sample = evaluate, sample
        self.work, self.first_loss = work, first_loss
        self.startup = startup
        self.resume, self.allow_data_change = resume, allow_data_change
        self.engine = engine or OneProcess(self.device, precision)
        if config.compile:
            self.model.compile()
        self.update = Update(self.model, objective, config, device=self.device, engine=self.engine)
        self.progress = Progress()
        self.peak: float | None = None  # FLOP/s of the devices of all ranks
        self.saver = Saver(self.checkpoints, keep_last=config.keep_last)
        self._validation: tuple[int, dict[str, float]] | None = None  # step, scores
        self._last_row = Progress()  # for the speed since the last train row
        self._steps_here = 0  # of this process

    def train_step(self, micro_batches: Iterable[Any]) -> StepStats:
        """One optimizer step on all micro-batches of it; see `Update`.

        Raises:
            DivergedError: loss or gradient is not finite; nothing was updated.
            DataError: the step has no unit.
        """
        first = self.first_loss if self.progress.step == 0 else None
        busy_s = self.update.busy_s
        stats = self.update(micro_batches, step=self.progress.step, first_loss=first)
        self.progress.busy_s += self.update.busy_s - busy_s
        self.progress.step += 1
        self.progress.tokens += stats.tokens
        self.progress.units += stats.units
        self.progress.scored += stats.scored
        self.progress.loss = stats.loss
        return stats

    def state_dict(self, *, copy: bool = False) -> dict[str, Any]:
        """All that a restart needs beside the weights, as tensors and plain values.

        All ranks call it, and rank 0 gets all of it.

        Args:
            copy: apart from what trains on, on the CPU.
        """
        return {
            "progress": asdict(self.progress),
            "update": self.update.state_dict(copy=copy),
            "rng": group().collect(rng_state(self.device)),
            "fingerprint": self.loader.fingerprint,
            "training": self.config.model_dump(mode="json"),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            DataError: the data or its order is not what it was.
            CheckpointError: the state is of another optimizer.
        """
        if state["fingerprint"] != self.loader.fingerprint:
            told = "the training data or its order changed since this run began"
            if not self.allow_data_change:
                raise DataError(
                    f"{self.folder}: {told}; start a new run, or allow it with --allow-data-change"
                )
            log.warning("%s: %s; going on, as asked", self.folder, told)
        now = self.config.model_dump(mode="json")
        changed = [key for key in now if now[key] != state["training"].get(key)]
        if changed:
            log.warning("going on with another config: training.%s", ", training.".join(changed))
        self.progress = Progress(**state["progress"])
        self.update.load_state_dict(state["update"])
        states = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]
        if group().ranks.rank < len(states):
            set_rng_state(states[group().ranks.rank], self.device)
        else:  # this rank is new
            seed_rank(self.config.seed, group().ranks.rank, self.progress.step)

    def _restore(self) -> None:
        """Start fresh, or go on from the newest good checkpoint."""
        found = group().leader(lambda: to_go_on_from(self.checkpoints, resume=self.resume))
        if found is None:
            seed_rank(self.config.seed, group().ranks.rank)
            return
        newest = Path(found)
        checkpoint = read_checkpoint(newest, verify=False)
        load_model_weights(self.model, checkpoint)
        self.load_state_dict(checkpoint.trainer_state())
        if self.progress.step < self.config.max_steps:
            self.progress.restarts += 1
        self.saver.resumed(newest, step=self.progress.step)
        if "validation" in checkpoint.meta:
            self._validation = (self.progress.step, checkpoint.meta["validation"])
        log.info("%s: going on from %s", self.folder.name, newest.name)

    def _contents(self, *, with_state: bool, copy: bool) -> dict[str, Any]:
        """What a checkpoint of now holds, as `write_checkpoint` takes it; all ranks call it."""
        meta = {
            **self.checkpoint_meta,
            "step": self.progress.step,
            "data_fingerprint": self.loader.fingerprint,
        }
        if self._validation is not None and self._validation[0] == self.progress.step:
            meta["validation"] = self._validation[1]
        return {
            "weights": self.engine.weights(self.model, copy=copy),
            "meta": meta,
            "tokenizer_json": self.tokenizer_json,
            "trainer_state": self.state_dict(copy=copy) if with_state else None,
        }

    def _save(self, *, wait: bool) -> None:
        """Publish a checkpoint of this step, unless it stands, and prune the old ones.

        Args:
            wait: until it is published; else training goes on beside it.
        """
        step = self.progress.step
        if step != self.saver.step:
            self.saver.finish()
            begin = time.perf_counter()
            contents = self._contents(with_state=True, copy=not wait)
            # A stop saves before the evaluation, so the folder may not know that it is the best.
            best = checkpoint_path(self.checkpoints, self.progress.best_step)
            self.saver.start(step, contents, protect={best}, begin=begin)
        if wait:
            self.saver.finish()

    def fit(self) -> FitResult:
        """Train up to ``max_steps``, or from the newest checkpoint on; publish ``final/``.

        Every rank calls it, and all do the same; rank 0 writes.

        Raises:
            DivergedError: loss, gradient or weights are not finite; names the last checkpoint.
            StoppedBySignal: a signal came; the step was finished and saved.
            CheckpointError: the folder's checkpoints are of another model.
            DataError: the data changed since the run began, or a step has nothing to learn.
            ProtectedPathError: a checkpoint cannot be written; the last good one stands.
            PeerError: another rank failed, or did not answer.
        """
        with group().named(lambda: f"{self.folder.name}, step {self.progress.step + 1}"):
            self._restore()
            self._last_row = replace(self.progress)
            if self.work is not None:
                peak = peak_flops(self.device, self.config.precision)
                self.peak = peak and peak * group().world_size
            with group().leader_first():  # who opens the log first mends it
                rows = JsonLines(self.folder / "metrics.jsonl", writes=group().leads)
            with RunLog(rows, title=self.folder.name, config=self.config) as self.run_log:
                self.saver.saved = self.run_log.saved
                self._tell_start()
                try:
                    with StopSignal() as stop:
                        self._loop(stop)
                except DivergedError as error:
                    self.saver.close()
                    self._tell_stop("diverged")
                    good = self.saver.newest or "none yet"
                    told = DivergedError(f"{error}; last good checkpoint: {good}")
                    told.told = None if group().leads else True  # by rank 0, which knows that one
                    raise told from None
                finally:
                    self.saver.close()
                result = self._publish()
                self._tell_stop("finished")
        return result

    def _loop(self, stop: StopSignal) -> None:
        self._after_step(stop)
        while self.progress.step < self.config.max_steps:
            begin = time.perf_counter()
            stats = self.train_step(self.loader.batches(self.progress.step))
            self._count(time.perf_counter() - begin, stats)
            if self._due(self.config.log_every) or self.progress.step == 1:
                self._tell_step(stats)
            self._after_step(stop)

    def _after_step(self, stop: StopSignal) -> None:
        """Evaluate, sample and save where it is due.

        A stop saves at once and leaves the rest: a scheduler's grace is shorter than a validation
        pass. The next start does first what is left. Of several ranks all save the same step.
        """
        self.saver.check()
        stop.agree()
        for hook in self._left():
            hook(stop)
            stop.agree()
        asked = stop.requested  # once: a signal during the save is answered after the next step
        if asked or self._due(self.config.save_every):
            last = self.progress.step == self.config.max_steps
            self._save(wait=last or asked is not None)
        if asked and (self.progress.step < self.config.max_steps or self._left()):
            self._tell_stop(f"signal:{asked}")
            raise StoppedBySignal(
                f"{self.folder.name}: {asked} after step {self.progress.step}; "
                "saved, the same command goes on from there (without --force)"
            )

    def _left(self) -> list[Callable[[StopSignal], None]]:
        """The hooks that are due after this step and not done."""
        step = self.progress.step
        left: list[Callable[[StopSignal], None]] = []
        evaluated = self._validation is not None and self._validation[0] == step
        if self.evaluate and not evaluated and (step == 0 or self._due(self.config.eval_every)):
            left.append(self._evaluate)
        every = self.config.sample_every
        if self.sample and every and self._due(every) and not self.run_log.rows.has("sample", step):
            left.append(self._sample)
        return left

    def _due(self, every: int) -> bool:
        """Whether a hook runs after this step: every so many steps, and at the end."""
        step = self.progress.step
        return step == self.config.max_steps or (step > 0 and every > 0 and step % every == 0)

    def _count(self, seconds: float, stats: StepStats) -> None:
        self.progress.seconds += seconds
        if self._steps_here > 0:
            self.progress.steady_seconds += seconds
            self.progress.steady_tokens += stats.tokens
            self.progress.steady_scored += stats.scored
        self._steps_here += 1

    def _aside(self, call: Hook, stop: StopSignal) -> Mapping[str, Any] | None:
        return aside(call, self.model, stop, device=self.device, compiled=self.config.compile)

    def _evaluate(self, stop: StopSignal) -> None:
        assert self.evaluate is not None
        scores = self._aside(self.evaluate, stop)
        if scores is None:
            return
        step, loss = self.progress.step, scores["loss"]
        self._validation = (step, dict(scores))
        if loss < self.progress.best_loss:
            self.progress.best_step, self.progress.best_loss = step, loss
        known = {"perplexity": perplexity(loss)} if self.objective.likelihood else {}
        self.run_log.evaluation({"step": step, **scores, **known})

    def _sample(self, stop: StopSignal) -> None:
        assert self.sample is not None
        with self.engine.generating(self.model):
            row = self._aside(self.sample, stop)
        if row is not None:
            self.run_log.sample({"step": self.progress.step, **row})

    def _publish(self) -> FitResult:
        """Write ``final/`` (weights alone), unless it stands."""
        p, final = self.progress, self.folder / "final"
        contents = self._contents(with_state=False, copy=False)
        digest = group().leader(
            lambda: standing_final(final, step=p.step) or write_checkpoint(final, **contents)
        )
        return fit_result(
            p, passes=p.step / self.loader.steps_per_epoch, work=self.work, peak=self.peak,
            peak_memory_gb=max(gb for (gb,) in group().gather([peak_memory_gb(self.device)])),
            checkpoint=final, sha256=digest,
        )  # fmt: skip

    def _tell_start(self) -> None:
        self.run_log.start(
            {
                "step": self.progress.step,
                "seed": self.config.seed,
                "config_sha256": sha256_json(self.config.model_dump(mode="json")),
                "data_fingerprint": self.loader.fingerprint,
                "resumed_from": self.saver.resumed_from and self.saver.resumed_from.name,
                "unit": self.objective.unit,
                "device": str(self.device),
                "engine": self.config.distributed.model_dump(mode="json"),
                "world_size": group().world_size,
                "peak_flops": self.peak,
                "startup": self.startup,
            }
        )

    def _tell_step(self, stats: StepStats) -> None:
        p, last = self.progress, self._last_row
        row = train_row(
            stats, p, last,
            likelihood=self.objective.likelihood, work=self.work, peak=self.peak,
        )  # fmt: skip
        eta_s = (self.config.max_steps - p.step) * (p.seconds - last.seconds) / (p.step - last.step)
        memory = memory_row(self.device)
        ranks = ranks_row(p, last, memory)
        self._last_row = replace(p)
        self.run_log.train(row | memory | ranks, eta_s=eta_s)

    def _tell_stop(self, status: str) -> None:
        p = self.progress
        self.run_log.stop({"step": p.step, "tokens": p.tokens, "status": status})

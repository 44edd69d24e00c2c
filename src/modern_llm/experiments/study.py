"""A study from its config to its comparison: arms on equal terms, all cells, one report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from modern_llm.config import PipelineConfig, StudyConfig, as_overrides, load_config
from modern_llm.errors import ConfigError, DataError, ModernLLMError, StoppedBySignal
from modern_llm.experiments.cells import Cell, run_cells, slots
from modern_llm.experiments.compare import SPEEDS, Speeds, comparison_record
from modern_llm.experiments.config import ExperimentConfig
from modern_llm.experiments.experiment import ArchitectureExperiment
from modern_llm.experiments.matching import cost_of, flops_ratio, steps_at, with_params_of
from modern_llm.experiments.results import ExperimentResult
from modern_llm.reporting.comparison import write_comparison
from modern_llm.runtime.artifacts import Policy
from modern_llm.runtime.signals import stop_at_once

SPEED_STEPS = 25  # of a measurement of speed; the first is left out


@dataclass(frozen=True)
class Outcome:
    """What a study came to.

    Attributes:
        folder: of the comparison; ``None`` when fewer than two arms have a result, or another
            comparison stands and was to be left.
        results: of every arm that has one.
        left_out: what has none, and why.
    """

    folder: Path | None
    results: tuple[ExperimentResult, ...]
    left_out: tuple[str, ...]


class Study:
    """Trains every arm from every seed, on equal terms, and compares them.

    Args:
        config: arms, seeds, and what is held equal.
        output: folder of all studies; this one's is ``<output>/<name>``.
        jobs: trainings at the same time; default: one a GPU, or as many as there are cores for.
        plugins: files that register components.

    Raises:
        ConfigError: every arm that cannot be, unless it is of a grid, where it is left out; or
            ``jobs`` is below 1.
    """

    def __init__(
        self,
        config: StudyConfig,
        *,
        output: Path,
        jobs: int | None = None,
        plugins: Sequence[Path] = (),
    ) -> None:
        self.config = config
        self.folder = output / config.name
        self.plugins = tuple(plugins)
        self.environments = slots(jobs, config.threads)
        self.left_out: list[str] = []
        self._began = time.monotonic()
        self._overrides = self._legal_arms()

    @cached_property
    def reference(self) -> str:
        """Name of the arm that the others are compared with."""
        names = list(self._overrides)
        if self.config.reference is None:
            return names[0]
        if self.config.reference not in names:
            raise ConfigError(f"the reference has no legal config: {'; '.join(self.left_out)}")
        return self.config.reference

    def _legal_arms(self) -> dict[str, list[str]]:
        """Overrides of every arm whose config is legal."""
        load_config(self.config.base)  # what is wrong there is told once, not for every arm
        legal, problems = dict[str, list[str]](), list[str]()
        for name, changes in self.config.changes().items():
            overrides = as_overrides({**self.config.overrides, **changes})
            try:
                config = load_config(self.config.base, overrides)
                cost_of(config.model, 1)
            except ConfigError as error:
                problems.append(f"{name}: {error}")
            else:
                legal[name] = overrides
        if problems and not self.config.grid:
            raise ConfigError("\n".join(problems))
        self.left_out += problems
        if len(legal) < 2:
            raise ConfigError("\n".join(["a study needs two legal arms or more", *problems]))
        return legal

    def _config(self, name: str, overrides: Sequence[str] = ()) -> PipelineConfig:
        return load_config(self.config.base, [*self._overrides[name], *overrides])

    @cached_property
    def experiments(self) -> dict[str, ArchitectureExperiment]:
        """Every arm that has its text, with what is held equal put right.

        Raises:
            ModernLLMError: no arm is left; what is wrong with the first.
        """
        speeds = self.speeds if self.config.hold == "seconds" else {}
        found, problems = dict[str, ArchitectureExperiment](), list[ModernLLMError]()
        for name in self._overrides:
            if self.config.hold == "seconds" and name not in speeds:
                continue  # told where it was measured
            try:
                experiment = self._experiment(name, self._on_equal_terms(name, speeds))
                experiment.cells  # noqa: B018 - tokenized here, and not by every cell at once
            except ConfigError as error:
                if not self.config.grid:
                    raise
                problems.append(error)
                self.left_out.append(f"{name}: {error}")
            except DataError as error:
                problems.append(error)
                self.left_out.append(f"{name}: {error}")
            else:
                found[name] = experiment
        if problems and not found:
            raise problems[0]
        return found

    def _shape(self, name: str) -> list[str]:
        """Overrides of an arm, with the width that ``hold=params`` gives it."""
        if self.config.hold != "params":
            return self._overrides[name]
        model, reference = self._config(name).model, self._config(self.reference).model
        return [*self._overrides[name], f"model.d_ff={with_params_of(model, reference).d_ff}"]

    def _on_equal_terms(self, name: str, speeds: Mapping[str, Speeds]) -> list[str]:
        """Overrides of an arm, with those that make it equal to the reference."""
        config, reference = self._config(name), self._config(self.reference)
        ratio = 1.0
        if self.config.hold == "flops":
            ratio = flops_ratio(config, reference)
        elif self.config.hold == "seconds":
            own, other = (speeds[arm]["tokens_per_s"] for arm in (name, self.reference))
            ratio = own / other
        steps = steps_at(config, reference, ratio=ratio)
        # Equal terms go before a cap on all stages, which the reference's steps are under already.
        return [*self._shape(name), f"pretrain.training.max_steps={steps}", "max_steps=null"]

    def _experiment(self, name: str, overrides: Sequence[str]) -> ArchitectureExperiment:
        config = ExperimentConfig(
            name, preset=self.config.base, overrides=overrides, seeds=self.config.seeds,
            threads=self.config.threads, output=self.folder / "cells", plugins=self.plugins,
        )  # fmt: skip
        return ArchitectureExperiment(config)

    @cached_property
    def speeds(self) -> dict[str, Speeds]:
        """Speeds of every arm alone, each the median of rounds that take turns.

        An arm whose speed cannot be measured is left out.

        Raises:
            ModernLLMError: the seconds of the reference are to be held, and it has no speed.
        """
        # Where the speeds decide the steps they come first, else what is trained is measured.
        names = self._overrides if self.config.hold == "seconds" else self.experiments
        measured: dict[str, list[Speeds]] = {name: [] for name in names}
        for turn in range(self.config.speed_rounds):
            for name in list(measured):
                try:
                    measured[name].append(self._speed(name, turn))
                except StoppedBySignal:
                    raise
                except ModernLLMError as error:
                    if self.config.hold == "seconds" and name == self.reference:
                        raise
                    self.left_out.append(str(error))
                    del measured[name]
        return {
            name: {metric: median(turn[metric] for turn in turns) for metric in turns[0]}
            for name, turns in measured.items()
        }

    def _speed(self, name: str, turn: int) -> Speeds:
        """Speeds of an arm in one round."""
        steps = [f"pretrain.training.max_steps={SPEED_STEPS}", "pretrain.training.warmup=0"]
        experiment = ArchitectureExperiment(
            ExperimentConfig(
                f"speed-{name}", preset=self.config.base,
                overrides=[*self._shape(name), *steps, "max_steps=null"], seeds=[turn],
                threads=self.config.threads, output=self.folder / "speed", plugins=self.plugins,
            )
        )  # fmt: skip
        failed = run_cells(experiment.cells, environments=self.environments[:1])
        result = experiment.collect(failed)
        if not result.seeds:
            raise ModernLLMError(f"speed of {name}: {'; '.join(result.failed.values())}")
        found = {metric: getattr(result.seeds[0], metric) for metric in SPEEDS}
        return {metric: value for metric, value in found.items() if value is not None}

    def run(
        self, *, command: str = "", on_exists: Policy = "timestamp", metric: str = "final_val_loss"
    ) -> Outcome:
        """Train what is missing, compare, and write ``<folder>/comparison``.

        Args:
            command: that runs it again, for the report.
            on_exists: what to do where another comparison stands.
            metric: see `compare_experiments`.

        Raises:
            StoppedBySignal: a signal came; the same call goes on.
            ConfigError: the arms do not compare.
            DataError: no arm has its text.
        """
        with stop_at_once():
            return self._run(command=command, on_exists=on_exists, metric=metric)

    def train_share(self, share: int, shares: int) -> tuple[list[Cell], dict[str, str]]:
        """Train every ``shares``-th cell from the ``share``-th on, and compare nothing.

        So that several machines divide a study: each cell is in one share, and `run` finds all of
        them finished.

        Args:
            share: from 1 to ``shares``.
            shares: in all.

        Returns:
            The cells of the share; name of each that has no result -> why.

        Raises:
            StoppedBySignal: a signal came; the same call goes on.
            ConfigError: equal seconds are to be held, which takes speeds of one machine.
        """
        if self.config.hold == "seconds":
            raise ConfigError("hold=seconds measures all speeds on one machine: no shares of it")
        with stop_at_once():
            cells = self._cells()[share - 1 :: shares]
            return cells, self._train(cells)

    def _cells(self) -> list[Cell]:
        """Every cell once; all arms of one seed come before the next seed.

        So that what is there early can be compared.
        """
        turns = zip(*(experiment.cells for experiment in self.experiments.values()), strict=True)
        return list({cell.name: cell for turn in turns for cell in turn}.values())

    def _train(self, cells: Sequence[Cell]) -> dict[str, str]:
        budget = self.config.budget_s
        until = None if budget is None else self._began + budget
        return run_cells(cells, environments=self.environments, until=until)

    def _run(self, *, command: str, on_exists: Policy, metric: str) -> Outcome:
        experiments = self.experiments
        failed = self._train(self._cells())
        results = list[ExperimentResult]()
        for name, experiment in experiments.items():
            result = experiment.collect(failed)
            if result.seeds:
                result.save(self.folder / "experiments", on_exists=on_exists)
                results.append(result)
            else:
                reasons = "; ".join(dict.fromkeys(result.failed.values()))
                self.left_out.append(f"{name}: {reasons}")
        return self._compared(results, command=command, on_exists=on_exists, metric=metric)

    def _compared(
        self, results: list[ExperimentResult], *, command: str, on_exists: Policy, metric: str
    ) -> Outcome:
        if len(results) < 2:
            return Outcome(None, tuple(results), tuple(self.left_out))
        facts: dict[str, Any] = {
            "description": self.config.description,
            "command": command,
            "left_out": self.left_out,
        }
        if self.config.speed_rounds:
            facts["speeds"] = self.speeds
            facts["speed"] = (
                f"Speeds and memory: each experiment alone for {SPEED_STEPS} steps, the median of "
                f"{self.config.speed_rounds} rounds that take turns; times follow from them."
            )
        names = [result.name for result in results]
        record = comparison_record(
            results, reference=self.reference if self.reference in names else None,
            metric=metric, title=self.config.name, hold=self.config.hold, facts=facts,
        )  # fmt: skip
        folder = write_comparison(self.folder / "comparison", record, on_exists=on_exists)
        return Outcome(folder, tuple(results), tuple(self.left_out))

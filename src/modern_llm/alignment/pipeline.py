"""The chain of stages: which folder, which parents, preflight, restart, report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modern_llm.alignment.precision import concrete
from modern_llm.alignment.preflight import Preflight
from modern_llm.alignment.stages import STAGES, Stage, TrainedStage
from modern_llm.config import PARTS, TRAINED_STAGES, PipelineConfig
from modern_llm.errors import ConfigError, ProtectedPathError
from modern_llm.runtime.artifacts import Policy, back_up, new_folder, write_json
from modern_llm.runtime.environment import environment
from modern_llm.runtime.files import locked
from modern_llm.runtime.logs import get_logger, log_of_rank
from modern_llm.runtime.names import standing_siblings
from modern_llm.runtime.ranks import group
from modern_llm.training.engines import check_launch

log = get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a call did: the run's folder and the stages that it ran (the others stood already)."""

    run: Path
    ran: tuple[str, ...]


class AlignmentPipeline:
    """Runs one stage, all of them, or those of alignment in one run folder.

    The same config finds its run again: finished stages stand, an unfinished one goes on. Another
    config under the same name gets a folder of its own.

    Args:
        config: the whole run, resolved.
        on_exists: what to do where another run, or a finished stage, stands already: ``timestamp``
            a new folder beside it, ``skip`` nothing, ``replace`` start again (a backup is kept).
        resume: go on with a run that exists, or refuse; not together with ``replace``.
        allow_data_change: go on with a stopped stage although its data is not what it was.
        origin: ``preset`` and ``command`` that the run was started with, for its record.

    Raises:
        ConfigError: a run cannot both go on and start again.
    """

    def __init__(
        self,
        config: PipelineConfig,
        *,
        on_exists: Policy = "timestamp",
        resume: bool = False,
        allow_data_change: bool = False,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        if resume and on_exists == "replace":
            raise ConfigError("--resume goes on with a run, --force starts again; give one of them")
        self.config = concrete(config)
        self.on_exists = on_exists
        self.resume = resume
        self.allow_data_change = allow_data_change
        self.origin = dict(origin or {})

    def preflight(
        self,
        stage: str = "all",
        *,
        checkpoint: Path | None = None,
        elsewhere: bool = False,
        ranks: int | None = None,
    ) -> Preflight:
        """Look for every mistake that can be found before compute is spent; writes nothing."""
        return Preflight(
            self.config, self._stages(stage), checkpoint, self._standing(),
            replace=self.on_exists == "replace", elsewhere=elsewhere, ranks=ranks,
        )  # fmt: skip

    def run(self, stage: str = "all", *, checkpoint: Path | None = None) -> Outcome | None:
        """Run ``stage``, or a part of the chain (`PARTS`), from its first stage that is not done.

        Args:
            stage: of `STAGES` or `PARTS`.
            checkpoint: where the first of them starts, in place of the stage before.

        Returns:
            What was done; ``None`` when another run stands under the name and it was to be skipped.

        Raises:
            ModernLLMError: any mistake of the user's; see `modern_llm.errors`.
        """
        for name in set(self._stages(stage)) & set(TRAINED_STAGES):
            training = self.config.stage(name).training
            check_launch(training.distributed.name, training.device)
        self.preflight(stage, checkpoint=checkpoint).raise_problems()
        run = self._claim_folder()
        if run is None:
            log.warning(
                "%s holds another run; nothing done (--no-overwrite)",
                self.config.paths.output / self.config.name,
            )
            return None
        with locked(run):
            _log_of_rank(run)
            self._write_records(run)
            ran = tuple(
                name
                for i, name in enumerate(self._stages(stage))
                if self._run_stage(run, name, checkpoint if i == 0 else None)
            )
        return Outcome(run, ran)

    def follow(self) -> None:
        """What the ranks beside the first do: train where rank 0 says so, until it is done.

        Raises:
            ModernLLMError: any of the training, on all ranks; that of rank 0 as a `PeerError`.
        """
        for order in group().orders():
            run, parent = Path(order["run"]), order["parent"]
            _log_of_rank(run)
            stage: TrainedStage = STAGES[order["stage"]](
                self.config, run, parent and Path(parent),
                allow_data_change=self.allow_data_change,
            )  # fmt: skip
            stage.train()

    @staticmethod
    def _stages(stage: str) -> Sequence[str]:
        return PARTS[stage] if stage in PARTS else (STAGES.resolve(stage),)

    def _run_stage(self, run: Path, name: str, checkpoint: Path | None) -> bool:
        """Run one stage unless its result stands; returns whether it ran."""
        folder = run / name
        if self.on_exists == "replace" and folder.exists():
            log.warning("%s: kept as %s", folder, back_up(folder).name)
        stage: Stage = STAGES[name](
            self.config, run, self._parent(run, name, checkpoint),
            allow_data_change=self.allow_data_change,
        )  # fmt: skip
        if stage.outdated():
            if self.on_exists == "skip":
                log.warning("%s is of other checkpoints than now; left (--no-overwrite)", folder)
                return False
            log.warning("%s is of other checkpoints: kept as %s", folder, back_up(folder).name)
        stage.claim()
        if (folder / "result.json").exists():
            log.info("%s: finished already, %s", name, folder / "result.json")
            return False
        stage.execute()
        return True

    def _parent(self, run: Path, name: str, checkpoint: Path | None) -> Path | None:
        before: str | None = STAGES[name].starts_from  # type: ignore[attr-defined]
        if checkpoint is not None or before is None:
            return checkpoint
        return run / before / "final"

    def _standing(self) -> Path | None:
        """The folder of this very config, if it ran before: the newest of its name."""
        wanted = self.config.sha256()
        for folder in standing_siblings(self.config.paths.output / self.config.name):
            if (folder / "config.json").is_file() and _config_hash(folder) == wanted:
                return folder
        return None

    def _claim_folder(self) -> Path | None:
        base = self.config.paths.output / self.config.name
        standing = self._standing()
        if standing is not None:
            return standing
        if self.resume:
            raise ConfigError(
                f"--resume: no run of this config below {base.parent} "
                f"({'another config has the name' if base.exists() else 'none of that name'})"
            )
        if base.is_dir() and not (base / "config.json").exists() and not _has_results(base):
            return base  # made by a process that got no further
        if self.on_exists == "replace" and base.exists():
            with locked(base):
                pass  # refuses while another process works there
        return new_folder(base, on_exists=self.on_exists)

    def _write_records(self, run: Path) -> None:
        written = write_json(
            run / "config.json", self.config.model_dump(mode="json"), on_exists="skip"
        )
        if written is not None:
            write_json(run / "environment.json", {**environment(), **self.origin}, on_exists="skip")
        elif _config_hash(run) != self.config.sha256():
            raise ProtectedPathError(f"{run}: another run took this folder; start again")


def _log_of_rank(run: Path) -> None:
    """Keep what each of several ranks logs beside the run's results."""
    if group().together:
        ranks = group().ranks
        log_of_rank(run / "logs" / f"rank-{ranks.rank:05d}.log", console_too=group().leads)


def _config_hash(run: Path) -> str | None:
    try:
        return PipelineConfig.model_validate(json.loads((run / "config.json").read_text())).sha256()
    except ValueError:
        return None  # of another version, or damaged: another run


def _has_results(folder: Path) -> bool:
    return any(path.name != ".lock" for path in folder.iterdir())

"""What one experiment is: an architecture, how it is trained, and from which seeds."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modern_llm.config import PipelineConfig, check_run_name, load_config
from modern_llm.config.train_flags import translate
from modern_llm.errors import ConfigError
from modern_llm.experiments.matching import cost_of
from modern_llm.runtime.artifacts import sha256_file

DECIDED = {  # what an experiment decides itself -> how that is said
    "name": "experiment_name",
    "seed": "seeds",
    "training.seed": "seeds",
    "pretrain.training.seed": "seeds",
    "training.threads": "threads",
    "pretrain.training.threads": "threads",
    "paths.output": "output",
}


@dataclass(frozen=True, init=False)
class ExperimentConfig:
    """One architecture, trained once from each seed.

    ``ExperimentConfig("wide", num_heads=8, hidden_size=320, max_steps=500, seeds=[0, 1, 2])``

    Args:
        experiment_name: of the result; letters, digits, ``.``, ``_`` and ``-``.
        preset: preset or config file that says whatever is not said here.
        overrides: ``section.field=value``, as on the command line.
        num_epochs: passes over the training text, in place of ``max_steps``.
        seeds: of weights and data order; experiments with the same seeds are compared in pairs.
        threads: of each training on a CPU.
        output: folder of all runs.
        plugins: files that register components of your own, loaded already
            (`modern_llm.registry.load_plugin`).
        fields: fields of the model and of its training, by our names or those of other projects:
            ``num_layers=4, position="rope", learning_rate=1e-3, batch_size=16, dataset="..."``.

    Raises:
        ConfigError: a field is unknown or a value is not legal; all problems at once.
    """

    experiment_name: str
    preset: str
    overrides: tuple[str, ...]
    num_epochs: float | None
    seeds: tuple[int, ...]
    threads: int
    output: Path
    plugins: tuple[Path, ...] = field(default=())

    def __init__(
        self,
        experiment_name: str,
        *,
        preset: str = "gpt2",
        overrides: Sequence[str] = (),
        num_epochs: float | None = None,
        seeds: Sequence[int] = (0,),
        threads: int = 1,
        output: Path | str = Path("experiments/runs"),
        plugins: Sequence[Path] = (),
        **fields: Any,
    ) -> None:
        flags = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in fields.items()
        ]
        values = {
            "experiment_name": experiment_name,
            "preset": preset,
            "overrides": (*translate(flags), *overrides),
            "num_epochs": num_epochs,
            "seeds": tuple(seeds),
            "threads": threads,
            "output": Path(output),
            "plugins": tuple(plugins),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()
        if num_epochs is not None and (steps := fields.keys() & {"max_steps", "max_iters"}):
            raise ConfigError(f"num_epochs and {', '.join(steps)}: give one of them")

    def _check(self) -> None:
        try:
            check_run_name(self.experiment_name)
        except ValueError as error:
            raise ConfigError(f"experiment_name: {error}") from None
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={list(self.seeds)}: at least one, and each once")
        if self.num_epochs is not None and not 0 < self.num_epochs < math.inf:
            raise ConfigError(f"num_epochs={self.num_epochs} must be above 0")
        given = [item.partition("=")[0].strip().removeprefix("--") for item in self.overrides]
        if decided := [field for field in dict.fromkeys(given) if field in DECIDED]:
            ways = (f"{field}: say it by {DECIDED[field]}" for field in decided)
            raise ConfigError("\n".join(ways))
        for seed in self.seeds:
            config = self.pipeline(seed)
        cost_of(config.model, 1)

    def pipeline(self, seed: int, *, max_steps: int | None = None) -> PipelineConfig:
        """Config of the run of one seed.

        Args:
            seed: of weights and data order.
            max_steps: in place of what preset and overrides say.
        """
        own = [f"seed={seed}", f"pretrain.training.seed={seed}"]  # a preset may have the second
        own += [f"pretrain.training.threads={self.threads}"]
        if max_steps is not None:  # wanted exactly, so a cap on all stages gives way
            own += [f"pretrain.training.max_steps={max_steps}", "max_steps=null"]
        own += [f"paths.output={json.dumps(str(self.output))}"]
        plugins = {path.name: sha256_file(path) for path in self.plugins}
        own += [f"plugins={json.dumps(plugins)}"] if plugins else []
        return load_config(self.preset, [*self.overrides, *own])

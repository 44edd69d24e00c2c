"""A study: architectures (arms), each trained from the same seeds, and what is held equal."""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from modern_llm.config.loading import explain, merge, presets_folder, read_file
from modern_llm.config.pipeline import check_run_name
from modern_llm.config.schema import Schema
from modern_llm.errors import ConfigError
from modern_llm.registry import suggest

Hold = Literal["tokens", "params", "flops", "seconds"]
MODES = ("demo", "full")


class StudyConfig(Schema):
    """Which arms, from which seeds, on what equal terms.

    Changes are ``{"section.field": value}``, as on the command line.
    """

    name: str
    description: str = ""
    base: str  # preset or file that every arm starts from
    overrides: dict[str, Any] = Field(default_factory=dict)  # changes of every arm
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)  # name -> its changes
    grid: dict[str, list[Any]] = Field(default_factory=dict)  # field -> values; the product is arms
    reference: str | None = None  # arm that the others are compared with; default: the first
    hold: Hold = "tokens"  # what is held equal, see docs/measurement.md
    seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0], min_length=1)
    threads: PositiveInt = 1  # of each training on a CPU
    speed_rounds: NonNegativeInt = 0  # speed measured apart, one arm at a time; 0: as trained
    budget_s: PositiveFloat | None = None  # no training is started past it

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_run_name(name)

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds={seeds}: each once; a seed twice is no second measurement")
        return seeds

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if bool(self.arms) == bool(self.grid):
            raise ValueError("give arms or grid, one of them")
        if bad := _bad_names(self.changes()):
            raise ValueError("\n".join(bad))
        if self.hold == "seconds" and not self.speed_rounds:
            raise ValueError("hold=seconds needs speed_rounds of 1 or more: the speed decides it")
        if self.reference is not None and self.reference not in self.changes():
            near = suggest(self.reference, list(self.changes()))
            raise ValueError(f"reference={self.reference!r} is no arm{near}")
        return self

    def changes(self) -> dict[str, dict[str, Any]]:
        """Name -> changes of every arm; those of a grid are named by their values."""
        if self.arms:
            return self.arms
        fields = list(self.grid)
        rows = [
            dict(zip(fields, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]
        return {_grid_name(row): row for row in rows}


def _bad_names(names: Iterable[str]) -> list[str]:
    """What is wrong with names of arms, those of a grid included: each becomes a folder's."""
    problems = []
    for name in names:
        try:
            check_run_name(name)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _grid_name(row: Mapping[str, Any]) -> str:
    """``n_heads5-n_layers4`` of one cell of a grid."""
    return "-".join(f"{field.rpartition('.')[2]}{value}" for field, value in row.items())


def list_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def load_study(name_or_path: str, *, mode: str = "", **changes: Any) -> StudyConfig:
    """Read a study.

    Args:
        name_or_path: name of a study in ``configs/studies``, or a path to a ``.json`` or ``.yaml``.
        mode: ``demo`` takes the file's small version (its section ``demo``); ``full`` as it is.
        changes: fields to replace.

    Raises:
        ConfigError: all problems at once.
    """
    path = _locate(name_or_path)
    raw = _read(path)
    demo = raw.pop("demo", None)
    if mode == "demo":
        if demo is None:
            raise ConfigError(f"{path.name} has no section 'demo': give --mode full")
        if not isinstance(demo, dict):
            raise ConfigError(f"{path.name}: demo={demo!r} should be a section")
        raw = merge(raw, {"name": f"{raw['name']}-demo", **demo})
    try:
        return StudyConfig.model_validate(merge(raw, changes))
    except ValidationError as error:
        raise ConfigError(explain(error, StudyConfig, f"study {path.name}")) from None


def _locate(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".json", ".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"{path}: no such study file")
        return path
    path = _folder() / f"{name_or_path}.json"
    if not path.is_file():
        names = list_studies()
        raise ConfigError(
            f"unknown study '{name_or_path}'{suggest(name_or_path, names)} (there are: "
            f"{', '.join(names)}; or give a path to a .json or .yaml file)"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    """A study file over the one that it ``extends``, which extends none."""
    own = {"name": path.stem, **read_file(path)}
    parent = own.pop("extends", None)
    return own if parent is None else merge(read_file(_locate(str(parent))), own)


def _folder() -> Path:
    return presets_folder() / "studies"


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """``{"model.norm": "layernorm"}`` as ``model.norm="layernorm"``, for `load_config`."""
    return [f"{field}={json.dumps(value)}" for field, value in changes.items()]

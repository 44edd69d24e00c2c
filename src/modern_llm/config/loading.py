"""From a preset name or a file, with ``extends`` and dotted overrides, to a `PipelineConfig`."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from modern_llm.config.model import ALIASES, canonical_names
from modern_llm.config.pipeline import TRAINED_STAGES, PipelineConfig
from modern_llm.errors import ConfigError
from modern_llm.registry import suggest

SUFFIXES = (".json", ".yaml", ".yml")
Rewrite = Callable[[dict[str, Any]], dict[str, Any]]


def presets_folder() -> Path:
    """Folder of the presets: in the package of a wheel, else at the root of the repository."""
    package = Path(__file__).resolve().parents[1] / "configs"
    return package if package.is_dir() else Path(__file__).resolve().parents[3] / "configs"


def list_presets() -> list[str]:
    """Names that ``--config`` takes beside paths."""
    return sorted(_presets())


def _presets() -> dict[str, Path]:
    """Name -> file of each preset, those of architectures in a folder of their own."""
    files = [f for pattern in ("*.json", "arch/*.json") for f in presets_folder().glob(pattern)]
    return {f.stem: f for f in files if f.stem != "schema" and not f.stem.startswith("_")}


def get_pipeline_preset(name: str) -> PipelineConfig:
    """The resolved config of a preset.

    Raises:
        ConfigError: no preset of that name.
    """
    return load_config(name)


def load_config(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, rewrite: Rewrite | None = None
) -> PipelineConfig:
    """Read, merge, override and check a config.

    Args:
        name_or_path: a preset's name, or a path to a ``.json``, ``.yaml`` or ``.yml`` file.
        overrides: ``section.field=value``; the value is read as JSON, else taken as text.
        rewrite: turns the content of that file, not of those that it extends, into sections.

    Raises:
        ConfigError: all problems at once, each with the field's path, value and rule.
    """
    raw = _read_with_parents(_locate(str(name_or_path), base=None), seen=(), rewrite=rewrite)
    # First what wipes other values: the shared section those of the stages, a choice what belonged
    # to the one before. Values of this line are excepted.
    ordered = sorted(
        overrides, key=lambda item: _keys(item)[0] != "training" and not _chooses(item)
    )
    problems = [problem for item in ordered if (problem := _override(raw, item))]
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, PipelineConfig, str(name_or_path))) from None


def _locate(name: str, *, base: Path | None) -> Path:
    """File of a preset name or a path; a relative path is tried beside ``base`` first."""
    if name.endswith(SUFFIXES):
        for path in ([base.parent / name] if base else []) + [Path(name)]:
            if path.is_file():
                return path
        raise ConfigError(f"{name}: no such config file")
    preset = _presets().get(name)
    if preset is None:
        presets = list_presets()
        raise ConfigError(
            f"unknown preset '{name}'{suggest(name, presets)} "
            f"(there are: {', '.join(presets)}; or give a path to a .json or .yaml file)"
        )
    return preset


def read_file(path: Path) -> dict[str, Any]:
    """One object of sections from a JSON or YAML file; a key that is given twice is refused.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text()
        if path.suffix == ".json":
            value = json.loads(text, object_pairs_hook=_once_each)
        else:
            value = _StrictLoader(text).get_single_data()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold one object of sections, has {type(value).__name__}")
    return value


def _once_each(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict of ``pairs``, in which a key given twice is an error and not the last one's value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = ", ".join(f"'{key}'" for key in value if keys.count(key) > 1)
        raise ConfigError(f"{twice} is given twice in one section; which one counts?")
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags that run code, and with each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Dict of a mapping node."""
        merges = "tag:yaml.org,2002:merge"
        own = [(self.construct_object(k), v) for k, v in node.value if k.tag != merges]
        value = super().construct_mapping(node, deep)
        _once_each(own)
        return value


def _read_with_parents(
    path: Path, *, seen: tuple[Path, ...], rewrite: Rewrite | None = None
) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    own = read_file(path)
    own.pop("$schema", None)
    if rewrite is not None:
        try:
            own = rewrite(own)
        except ConfigError as error:
            raise ConfigError(f"config {path}:\n{error}") from None
    parent_name = own.pop("extends", None)
    if isinstance(own.get("model"), dict):
        try:
            own["model"] = canonical_names(own["model"])
        except ValueError as error:
            raise ConfigError(f"{path}: model: {error}") from None
    own.setdefault("name", path.stem)
    if parent_name is None:
        return own
    parent = _read_with_parents(_locate(str(parent_name), base=path), seen=(*seen, path))
    if isinstance(own.get("model"), dict):
        _forget(parent, own["model"])
    return merge(parent, own)


def _forget(below: dict[str, Any], own: dict[str, Any]) -> None:
    """A choice of ``own`` does not inherit what belonged to the choice of the model ``below``.

    That is the activation of a feed-forward, and the window of an attention that has none now.
    """
    model, ffn = below.get("model"), own.get("ffn")
    gone: tuple[str, ...] = ()
    if isinstance(ffn, str) or (isinstance(ffn, dict) and "name" in ffn):
        gone += ("activation",)
    if own.get("attention", "window") != "window":
        gone += ("window", "window_pattern", "n_sinks")
    if isinstance(model, dict):
        below["model"] = {key: value for key, value in model.items() if key not in gone}


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section; lists are replaced whole.

    So is what has a name: a component or source that is named anew does not inherit the options of
    the one below. Without a name its options go to the one below.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, dict):
            old = {"name": old}
        if isinstance(value, dict) and isinstance(old, dict) and "name" not in value:
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _keys(item: str) -> list[str]:
    """Path of the field that an override names."""
    return item.partition("=")[0].strip().removeprefix("--").split(".")


def value_of(text: str) -> Any:
    """The value of an override: JSON, or Python's ``True``, ``False`` and ``None``, else text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _chooses(item: str) -> bool:
    """Whether an override names a choice that others belong to; see `_forget`."""
    section, *field = _keys(item)
    return section == "model" and [ALIASES.get(key, key) for key in field] in (
        ["attention"],
        ["ffn"],
    )


def _override(raw: dict[str, Any], item: str) -> str | None:
    """Apply one ``section.field=value`` in place; returns a problem, if any."""
    _, separator, text = item.partition("=")
    keys = _keys(item)
    if not separator or not all(keys):
        return f"override {item!r}: write section.field=value, such as training.lr=3e-4"
    if keys[0] == "model" and len(keys) > 1:
        keys[1] = ALIASES.get(keys[1], keys[1])
    value = value_of(text)
    if _chooses(item):
        _forget(raw, canonical_names({keys[1]: value}))
    if keys[0] == "training" and len(keys) > 1:  # for every stage, so the stages' own give way
        for stage in TRAINED_STAGES:
            section = raw.get(stage)
            if isinstance(section, dict) and isinstance(section.get("training"), dict):
                own = {k: v for k, v in section["training"].items() if k != keys[1]}
                raw[stage] = {**section, "training": own}
    return _set(raw, keys, value, item)


def _set(container: Any, keys: list[str], value: Any, item: str) -> str | None:
    """Set the value below ``container``, copying on the way down; returns a problem, if any."""
    key, rest = keys[0], keys[1:]
    if isinstance(container, list):
        if not key.isdigit() or int(key) >= len(container):
            return f"override {item!r}: '{key}' is no index into a list of {len(container)}"
        slot: Any = int(key)
    elif isinstance(container, dict):
        slot = key
    else:
        return f"override {item!r}: there is nothing below '{container}'"
    if not rest:
        container[slot] = value
        return None
    child = container[slot] if isinstance(container, list) else container.get(slot)
    if child is None:
        child = {}
    elif isinstance(child, str):  # "rope" -> {"name": "rope"}, so that an option can be set
        child = {"name": child}
    container[slot] = copy.copy(child)
    return _set(container[slot], rest, value, item)


def explain(error: ValidationError, schema: type[BaseModel], where: str) -> str:
    """All problems of a validation, one a line: path, value, rule, nearest valid name."""
    lines: dict[str, dict[str, None]] = {}  # what is wrong -> rules, of which one must hold
    for problem in error.errors(include_url=False):
        fields, path = _resolved(schema, problem["loc"])
        place, rule = ".".join(path), problem["msg"]
        if problem["type"] == "value_error":
            for part in rule.removeprefix("Value error, ").splitlines():
                lines[f"{place}: {part}" if place else part] = {}
            continue
        if problem["type"] == "extra_forbidden":
            near = suggest(path[-1], [*fields, *(ALIASES if "d_model" in fields else ())])
            rule = f"unknown field{near} (fields here: {', '.join(sorted(fields))})"
        elif problem["type"] == "missing":
            rule = "is required"
        else:
            if problem["type"] == "literal_error":
                choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
                rule += suggest(str(problem["input"]), choices)
            place = f"{place}={problem['input']!r}"
            if problem["type"] == "model_type":
                named = problem["ctx"]["class_name"] in ("Component", "SourceConfig")
                rule = f"should be {'a name, or name and options' if named else 'a section'}"
        lines.setdefault(place, {})[rule] = None
    told = [
        f"  {what}{': ' if rules else ''}{', or '.join(rules)}" for what, rules in lines.items()
    ]
    return "\n".join([f"config {where}:", *_without_copies(told)])


def _without_copies(lines: list[str]) -> list[str]:
    """Tell a mistake of the shared ``training`` section once, not for every stage."""
    told: dict[str, None] = {}
    for line in lines:
        stage, _, rest = line.strip().partition(".")
        shared = rest.startswith("training") and all(
            f"  {s}.{rest}" in lines for s in TRAINED_STAGES
        )
        told[f"  {rest}" if shared and stage in TRAINED_STAGES else line] = None
    return list(told)


def _resolved(
    schema: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[list[str], list[str]]:
    """Fields of the section that an error is in, and its path without pydantic's own parts."""
    section: type[BaseModel] | None = schema
    fields, path = list(schema.model_fields), []
    for part in location:
        if isinstance(part, str) and section is None:
            break  # a member of a union, not a field
        path.append(str(part))
        if isinstance(part, str) and section is not None:
            fields = list(section.model_fields)
            field = section.model_fields.get(part)
            section = None if field is None else _section_of(field.annotation)
    return fields, path


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a list, or beside ``None``."""
    candidates = [
        annotation,
        *(a for part in get_args(annotation) for a in (part, *get_args(part))),
    ]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors; nothing is required, since a file may extend."""

    def relax(node: Any) -> Any:
        if isinstance(node, dict):
            properties = node.get("properties", {})
            keep = "name" in properties and set(properties) <= {"name", "weight"}
            return {k: relax(v) for k, v in node.items() if keep or k != "required"}
        return [relax(item) for item in node] if isinstance(node, list) else node

    schema: dict[str, Any] = relax(PipelineConfig.model_json_schema())
    schema["properties"]["extends"] = {"type": "string", "description": "preset or path below this"}
    schema["properties"]["$schema"] = {"type": "string"}
    aliases = {name: schema["$defs"]["ModelConfig"]["properties"][f] for name, f in ALIASES.items()}
    schema["$defs"]["ModelConfig"]["properties"].update(aliases)
    return schema

"""One small registry for everything that a config names: components, sources, stages.

The signature of a registered class is its schema: positional parameters are given by the builder,
keyword-only parameters are the user's options.
"""

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from modern_llm.errors import ConfigError

C = TypeVar("C", bound=Callable[..., Any])
_REGISTRIES: list["Registry"] = []  # all that were made, for `load_plugin` to look through


class Named(Protocol):
    """A component as a config states it."""

    @property
    def name(self) -> str:
        """Registered name or alias."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Keyword-only options of the registered class."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest of ``choices``, or an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def _signed(entry: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose annotations are the entry's."""
    return entry.__init__ if inspect.isclass(entry) else entry


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a config is of an annotated type; types not known here pass."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if hint in (bool, None, NoneType):
        return isinstance(value, bool) if hint is bool else value is None
    if hint in (int, float):
        numbers = int if hint is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str | Path)
    if kind in (Sequence, list, tuple):
        items = parts[0] if parts else Any
        return isinstance(value, list | tuple) and all(_fits(item, items) for item in value)
    return isinstance(value, Mapping) if kind in (Mapping, dict) else True


def _lacking(entry: Callable[..., Any], base: type, sizes: Sequence[str]) -> list[str]:
    """What keeps ``entry`` from being built with ``sizes`` and used as a ``base``."""
    name = getattr(entry, "__name__", repr(entry))
    if not (inspect.isclass(entry) and issubclass(entry, base)):
        return [f"{name} must be a subclass of {base.__name__}"]
    parameters = list(inspect.signature(entry).parameters.values())
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in taken)
    most = math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(taken)
    problems = []
    if missing := getattr(entry, "__abstractmethods__", ()):
        problems.append(f"{name} defines no {', '.join(sorted(missing))}")
    if not least <= len(sizes) <= most:
        given = ", ".join(p.name for p in taken)
        problems.append(f"{name} takes ({given}), it is given ({', '.join(sizes)})")
    return problems


class Registry(Mapping[str, Callable[..., Any]]):
    """Name -> class or function, with aliases, refusing duplicates and explaining misses.

    Args:
        kind: what is registered, as the user is told ("norm", "position encoding").
        base: class that every entry must extend; None: entries are not looked into.
        sizes: names of the positional parameters that the builder gives.
    """

    def __init__(self, kind: str, *, base: type | None = None, sizes: Sequence[str] = ()) -> None:
        self.kind, self.base, self.sizes = kind, base, sizes
        self._entries: dict[str, Callable[..., Any]] = {}
        self._aliases: dict[str, str] = {}
        _REGISTRIES.append(self)

    def register(self, name: str, *aliases: str) -> Callable[[C], C]:
        """Class decorator.

        Raises:
            ValueError: the name or an alias is taken.
            TypeError: the class lacks what its kind needs; names all of it.
        """

        def add(entry: C) -> C:
            if self.base is not None and (lacking := _lacking(entry, self.base, self.sizes)):
                raise TypeError(f"{self.kind} '{name}': {'; '.join(lacking)}")
            for key in (name, *aliases):
                if key in self._entries or key in self._aliases:
                    raise ValueError(f"{self.kind} '{key}' is registered already")
            self._entries[name] = entry
            self._aliases.update(dict.fromkeys(aliases, name))
            return entry

        return add

    def resolve(self, name: str) -> str:
        """Canonical name of ``name``, which may be an alias.

        Raises:
            ConfigError: nothing of that name; lists what there is and the nearest match.
        """
        canonical = self._aliases.get(name, name)
        if canonical not in self._entries:
            known = ", ".join(sorted(self._entries))
            hint = suggest(name, [*self._entries, *self._aliases])
            raise ConfigError(f"unknown {self.kind} '{name}'{hint} (there are: {known})")
        return canonical

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters of an entry: the options that a config may set."""
        parameters = inspect.signature(self[name]).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, name: str, options: Mapping[str, Any]) -> None:
        """Refuse options that the entry does not have or take, with the list of those accepted.

        Raises:
            ConfigError: unknown name, unknown option, a value of another type than the signature
                says, or a required option is missing.
        """
        accepted = self.options(name)
        listing = ", ".join(str(p) for p in accepted.values()) or "no options"
        for option in options:
            if option not in accepted:
                raise ConfigError(
                    f"{self.kind} '{name}': unknown option '{option}'"
                    f"{suggest(option, accepted)} (it accepts {listing})"
                )
        hints = get_type_hints(_signed(self[name])) if options else {}
        for option, value in options.items():
            if not _fits(value, hints.get(option, Any)):
                raise ConfigError(
                    f"{self.kind} '{name}': option {option}={value!r} is of the wrong type "
                    f"(it accepts {listing})"
                )
        missing = [
            p.name
            for p in accepted.values()
            if p.default is inspect.Parameter.empty and p.name not in options
        ]
        if missing:
            raise ConfigError(
                f"{self.kind} '{name}': missing {', '.join(missing)} (it accepts {listing})"
            )

    def build(self, component: Named | str, *sizes: Any) -> Any:
        """Build ``component`` with the builder's ``sizes`` and the config's options.

        Raises:
            ConfigError: as in `check`.
        """
        if isinstance(component, str):
            name, options = component, {}
        else:
            name, options = component.name, dict(component.options)
        self.check(name, options)
        return self[name](*sizes, **options)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._entries[self.resolve(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load_plugin(path: Path) -> list[str]:
    """Run a Python file that registers components, as if it were part of the package.

    Returns:
        What it registered, such as ``norm 'mine'``.

    Raises:
        ConfigError: no such file, one of its name is loaded, it fails, it registers nothing, a name
            that is taken, or a class that lacks what its kind needs.
    """
    if not path.is_file():
        raise ConfigError(f"--plugin {path}: no such file")
    name = f"modern_llm_plugin_{path.stem}"
    if name in sys.modules:
        raise ConfigError(f"--plugin {path}: a plugin named {path.name} is loaded already")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path}: is no Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and annotations look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"--plugin {path}: {type(error).__name__}: {error}") from error
    added = [
        f"{registry.kind} '{entry}'"
        for registry in _REGISTRIES
        for entry, made in registry.items()
        if made.__module__ == name
    ]
    if not added:
        del sys.modules[name]
        raise ConfigError(
            f"--plugin {path}: registers nothing; decorate a class, such as "
            "@NORMS.register('mine') of modern_llm.models.norms"
        )
    return added

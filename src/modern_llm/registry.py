"""One small registry for everything that a config names: components, sources, stages.

The signature of a registered class is its schema: positional parameters are given by the builder,
keyword-only parameters are the user's options.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from modern_llm.errors import ConfigError

C = TypeVar("C", bound=Callable[..., Any])


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


class Registry(Mapping[str, Callable[..., Any]]):
    """Name -> class or function, with aliases, refusing duplicates and explaining misses.

    Args:
        kind: what is registered, as the user is told ("norm", "position encoding").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Callable[..., Any]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[C], C]:
        """Class decorator; a name or alias that is taken raises ``ValueError``."""

        def add(entry: C) -> C:
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
        """Refuse unknown options and missing required ones with the list of those accepted.

        Raises:
            ConfigError: unknown name, unknown option, or a required option is missing.
        """
        accepted = self.options(name)
        listing = ", ".join(str(p) for p in accepted.values()) or "no options"
        for option in options:
            if option not in accepted:
                raise ConfigError(
                    f"{self.kind} '{name}': unknown option '{option}'"
                    f"{suggest(option, accepted)} (it accepts {listing})"
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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from modern_llm.config import Component
from modern_llm.errors import ConfigError
from modern_llm.registry import Registry, suggest


class Part:
    def __init__(
        self,
        size: int,
        *,
        theta: float = 1.5,
        mode: Literal["a", "b"] = "a",
        names: Sequence[str] | None = None,
        table: Mapping[str, str] | None = None,
        on: bool = False,
        count: int = 1,
        path: str | Path = "x",
        free: Any = None,
    ) -> None:
        self.size, self.theta, self.count = size, theta, count


@pytest.fixture
def parts() -> Registry:
    registry = Registry("part")
    registry.register("first", "primary", "one")(Part)

    @registry.register("needy")
    def needy(size: int, *, path: str) -> tuple[int, str]:
        return size, path

    return registry


def test_a_registry_is_a_mapping_of_canonical_names(parts: Registry) -> None:
    assert sorted(parts) == ["first", "needy"]
    assert len(parts) == 2
    assert parts["one"] is parts["first"] is Part
    assert parts.resolve("primary") == "first"
    assert "one" in parts and "first" in parts and "two" not in parts and 3 not in parts


@pytest.mark.parametrize("name", ["first", "primary", "needy"])
def test_a_taken_name_is_refused(parts: Registry, name: str) -> None:
    for names in ((name,), ("new", name)):
        with pytest.raises(ValueError, match=f"part '{name}' is registered already"):
            parts.register(*names)(Part)


def test_a_miss_lists_what_there_is_and_the_nearest(parts: Registry) -> None:
    with pytest.raises(ConfigError) as told:
        parts["frist"]
    assert (
        str(told.value) == "unknown part 'frist'; did you mean 'first'? (there are: first, needy)"
    )
    with pytest.raises(ConfigError, match=r"did you mean 'primary'\?"):
        parts.resolve("primari")
    with pytest.raises(ConfigError, match=r"unknown part 'zzz' \(there are"):
        parts.build("zzz", 1)


def test_an_unknown_option_lists_those_accepted(parts: Registry) -> None:
    with pytest.raises(ConfigError) as told:
        parts.build(Component("one", tetha=2.0), 3)
    text = str(told.value)
    assert "part 'one': unknown option 'tetha'; did you mean 'theta'?" in text
    assert "theta: float = 1.5" in text
    empty = Registry("shape")
    empty.register("dot")(lambda size: size)
    with pytest.raises(ConfigError, match="it accepts no options"):
        empty.check("dot", {"x": 1})


def test_a_missing_option_is_told(parts: Registry) -> None:
    with pytest.raises(ConfigError, match=r"part 'needy': missing path \(it accepts path: str\)"):
        parts.build("needy", 1)
    assert parts.build(Component("needy", path="p"), 1) == (1, "p")


def test_positional_parameters_are_no_options(parts: Registry) -> None:
    with pytest.raises(ConfigError, match="unknown option 'size'"):
        parts.build(Component("first", size=4), 3)


def test_building_hands_sizes_and_options_on(parts: Registry) -> None:
    built = parts.build(Component("one", theta=2.0), 7)
    assert (built.size, built.theta, built.count) == (7, 2.0, 1)
    assert parts.build("first", 3).theta == 1.5


FITTING = {
    "theta": [1, 2.5],
    "mode": ["a", "b"],
    "names": [None, [], ["x", "y"], ("x",)],
    "table": [None, {"a": "b"}],
    "on": [True, False],
    "count": [0, -3],
    "path": ["a/b", Path("a")],
    "free": [None, 1, "x", [], {}],
}
WRONG = {
    "theta": ["1.5", None, True, [1.0]],
    "mode": ["c", None, 1],
    "names": ["xy", [1], 3],
    "table": ["x", []],
    "on": [0, "true", None],
    "count": [1.0, True, "1", None],
    "path": [1, None, ["a"]],
}


@pytest.mark.parametrize("option", FITTING)
def test_an_option_of_the_right_type_is_taken(parts: Registry, option: str) -> None:
    for value in FITTING[option]:
        parts.check("first", {option: value})


@pytest.mark.parametrize("option", WRONG)
def test_an_option_of_another_type_is_refused(parts: Registry, option: str) -> None:
    for value in WRONG[option]:
        with pytest.raises(ConfigError) as told:
            parts.check("first", {option: value})
        assert f"option {option}={value!r} is of the wrong type" in str(told.value)


def test_suggest() -> None:
    assert suggest("rmsnrm", ["rmsnorm", "layernorm"]) == "; did you mean 'rmsnorm'?"
    assert suggest("qqq", ["rmsnorm"]) == ""


class Base:
    def __init__(self, width: int, *options: int) -> None: ...


class Fits(Base):
    def __init__(self, width: int, height: int = 1, *, theta: float = 1.0) -> None: ...


class TooFew(Base):
    def __init__(self, *, theta: float = 1.0) -> None: ...


class TooMany(Base):
    def __init__(self, width: int, height: int, depth: int) -> None: ...


def test_an_entry_has_what_its_kind_needs() -> None:
    shapes = Registry("shape", base=Base, sizes=("width", "height"))
    shapes.register("fits")(Fits)
    shapes.register("any")(Base)
    refusals = {
        Part: "Part must be a subclass of Base",
        TooFew: r"TooFew takes \(\), it is given \(width, height\)",
        TooMany: r"TooMany takes \(width, height, depth\), it is given \(width, height\)",
    }
    for entry, told in refusals.items():
        with pytest.raises(TypeError, match=f"shape 'mine': {told}"):
            shapes.register("mine")(entry)
    assert sorted(shapes) == ["any", "fits"]

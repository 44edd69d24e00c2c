"""Base of all config sections, and the two shapes that carry a name with free options."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

MIN_SHARE = 0.001  # of a mixture: one row in 1000


class Schema(BaseModel):
    """Frozen section; an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_defaults(cls, value: Any) -> Any:
        """``{"theta": 1e5}`` without a name sets an option of the field's default component."""
        if not isinstance(value, Mapping):
            return value
        named = dict(value)
        for name, field in cls.model_fields.items():
            given = value.get(name)
            if isinstance(field.default, Component) and isinstance(given, Mapping):
                named[name] = {"name": field.default.name, **given}
        return named


def count_of(raw: Any) -> int | None:
    """The count that a raw value stands for (``64`` or ``"64"``), ``None`` if it stands for none.

    For defaults that follow another field, before that field is checked and told to be wrong.
    """
    try:
        return max(0, int(raw)) or None
    except (TypeError, ValueError, OverflowError):
        return None


class Component(Schema):
    """A registered component: ``"rope"`` or ``{"name": "rope", "theta": 500000}``.

    All keys but ``name`` are the component's options; its signature says which it accepts.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**{"name": name, "options": options})

    # Pydantic then validates a mapping itself, and an error keeps its place in the config.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value, "options": {}}
        if isinstance(value, Mapping) and "options" not in value:
            own = {"name": value["name"]} if "name" in value else {}
            return {**own, "options": {k: value[k] for k in value if k != "name"}}
        return value

    @model_serializer
    def _flatten(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.options} if self.options else self.name

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        named = {"type": "object", "properties": {"name": {"type": "string"}}}
        return {"anyOf": [{"type": "string"}, named], "description": "name, or name with options"}


def given_shares(weights: Sequence[float | None]) -> list[float | None]:
    """Shares that the weights of a mixture state; ``None`` shares what is left by size.

    Where every part has a weight, they are relative (1 and 3); beside a ``None`` a weight is the
    share itself.

    Raises:
        ValueError: nothing is left for a ``None``, or a share is below `MIN_SHARE`.
    """
    given = sum(weight for weight in weights if weight is not None)
    if None in weights and given >= 1:
        raise ValueError(
            f"weights sum to {given:g} and leave nothing to the sources without one: beside those "
            "a weight is a share below 1; or give every source a weight"
        )
    whole = 1.0 if None in weights else given
    shares = [None if weight is None else weight / whole for weight in weights]
    for weight, share in zip(weights, shares, strict=True):
        if share is not None and share < MIN_SHARE:
            raise ValueError(
                f"weight={weight:g} is a share of {share:g}, below {MIN_SHARE:g}: raise it, or "
                "leave the source out"
            )
    return shares


class SourceConfig(Schema):
    """One data source: its registered name, its share in a mixture, and the source's options.

    ``{"name": "tinystories", "weight": 0.4}``; all other keys are options of the source.
    """

    name: str
    weight: float | None = None  # see `given_shares`; None: in proportion to its size
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "options" not in value:
            own = {key: value[key] for key in ("name", "weight") if key in value}
            return {**own, "options": {k: value[k] for k in value if k not in ("name", "weight")}}
        return value

    @model_validator(mode="after")
    def _check_weight(self) -> Self:
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight={self.weight} must be above 0; leave the source out instead")
        return self

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        weight = {} if self.weight is None else {"weight": self.weight}
        return {"name": self.name, **weight, **self.options}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        properties = {"name": {"type": "string"}, "weight": {"type": "number"}}
        named = {"type": "object", "properties": properties, "required": ["name"]}
        return {"anyOf": [{"type": "string"}, named], "description": "name, or name with options"}

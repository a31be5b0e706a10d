"""Base classes of every configuration: frozen, strict, flat on the outside, hashed by content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from parallelmind.config.explain import explain
from parallelmind.errors import UserError


def short_hash(values: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of values that JSON can hold, whatever their order."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


class FrozenConfig(BaseModel):
    """Frozen, strict group of fields. An unknown field is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        ser_json_inf_nan="constants",  # otherwise `GroupedConfig` would dump infinity as null
    )

    NON_IDENTITY_FIELDS: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where something runs or how it is reported. They do not change the fingerprint."""

    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset()
    """Fields that were added after 0.1.0. At its default such a field does not change the fingerprint, so
    runs of earlier versions are found again."""

    def __init__(self, **values: Any) -> None:
        """Raise UserError, with every problem in one line, in place of pydantic's ValidationError."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(explain(type(self), error, "docs/reference.md")) from None

    # Nested configurations are validated with the outer one, as without an `__init__` of our own, so that an
    # error names the whole path of its field.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        raise UserError(f"{name}: a {type(self).__name__} is frozen; make another one with {name}=…")

    def __hash__(self) -> int:
        """Hash of all values; pydantic's own needs every value to be hashable, and a list is not."""
        return hash(self.model_dump_json())

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        """Every field by the name that a user writes, in the order of config.yaml."""
        return dict(cls.model_fields)

    @classmethod
    def groups(cls) -> dict[str, type[FrozenConfig]]:
        """The class of every group, by the name of its field: those of a GroupedConfig."""
        return {}

    @classmethod
    def field_owners(cls) -> dict[str, type[FrozenConfig]]:
        """The class that declares each flat field."""
        return {
            name: next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
            for name in cls.model_fields
        }

    def fingerprint(self) -> str:
        """First 12 hex digits of the SHA-256 of all fields except `NON_IDENTITY_FIELDS`.

        The same settings give the same fingerprint on every machine.
        """
        return short_hash(self.identity())

    def identity(self) -> dict[str, Any]:
        """The values that the fingerprint is made of, by flat name."""
        return {
            name: value
            for name, value in self.dump_without_later_defaults().items()
            if name not in self.NON_IDENTITY_FIELDS
        }

    @classmethod
    def later_fields(cls) -> frozenset[str]:
        """`LATER_FIELDS` by flat name."""
        return cls.LATER_FIELDS

    def dump_without_later_defaults(self) -> dict[str, Any]:
        """All values as JSON, without those of `LATER_FIELDS` that are at their defaults."""
        values = self.model_dump(mode="json")
        for name, value in self:
            if name in values and isinstance(value, FrozenConfig):
                values[name] = value.dump_without_later_defaults()
        fields, later = self.flat_fields(), self.later_fields()
        return {
            name: value
            for name, value in values.items()
            if name not in later or value != fields[name].default
        }


class GroupedConfig(FrozenConfig):
    """Configuration whose fields are groups, read and written as one flat namespace.

    A field whose type is a FrozenConfig is a group: code reads `config.rope.visibility`. Users write flat
    names: keyword arguments, `model_validate`, YAML and `key=value` take `visibility=isolated`, and
    `model_dump` returns the same flat mapping. A group instance is accepted under the group's name. A field
    whose type is itself a GroupedConfig is an ordinary nested field, not a group.
    """

    @classmethod
    def groups(cls) -> dict[str, type[FrozenConfig]]:
        return {
            name: field.annotation
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type)
            and issubclass(field.annotation, FrozenConfig)
            and not issubclass(field.annotation, GroupedConfig)
        }

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        groups = cls.groups()
        fields: dict[str, FieldInfo] = {}
        for name, field in cls.model_fields.items():
            fields |= groups[name].model_fields if name in groups else {name: field}
        return fields

    @classmethod
    def field_owners(cls) -> dict[str, type[FrozenConfig]]:
        groups = cls.groups()
        owners: dict[str, type[FrozenConfig]] = {}
        for name, owner in super().field_owners().items():
            owners |= groups[name].field_owners() if name in groups else {name: owner}
        return owners

    @classmethod
    def later_fields(cls) -> frozenset[str]:
        return cls.LATER_FIELDS.union(*(group.LATER_FIELDS for group in cls.groups().values()))

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class whose flat names are ambiguous.

        Raises:
            TypeError: two groups have a field of the same name, or a field has the name of a group.
        """
        super().__pydantic_init_subclass__(**kwargs)
        names = Counter(
            [*cls.model_fields, *(name for group in cls.groups().values() for name in group.model_fields)]
        )
        if ambiguous := [name for name, count in names.items() if count > 1]:
            raise TypeError(
                f"{cls.__name__}: field names are not unique across groups: {', '.join(ambiguous)}"
            )

    @model_validator(mode="before")
    @classmethod
    def _group_flat_values(cls, values: Any) -> Any:
        """Sort flat values into their groups. Unknown names stay at the top, where they are refused."""
        if not isinstance(values, dict):
            return values
        groups = cls.groups()
        group_of = {field: name for name, group in groups.items() for field in group.model_fields}
        grouped: dict[str, Any] = {name: {} for name in groups}
        for name, value in values.items():
            if name in group_of:
                grouped[group_of[name]][name] = value
            elif name not in groups:
                grouped[name] = value
            elif isinstance(value, groups[name]):
                grouped[name] = {**dict(value), **grouped[name]}
            else:
                raise ValueError(f"{name}: unknown field; --help lists them all")
        return grouped

    @model_serializer(mode="wrap")
    def _flatten(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        groups = self.groups()
        flat: dict[str, Any] = {}
        for name, value in serialize(self).items():
            flat |= value if name in groups else {name: value}
        return flat

    def replace(self, **fields: Any) -> Self:
        """A validated copy with other values of flat fields. Raises UserError as the class does."""
        return type(self)(**{**self.model_dump(), **fields})

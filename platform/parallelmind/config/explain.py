"""What pydantic refuses in a configuration, as one line with field, value and remedy."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from parallelmind.config.other_names import similar_name
from parallelmind.errors import format_value


class ConfigClass(Protocol):
    """What is needed of a class of configurations, `FrozenConfig`, which imports this file."""

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]: ...

    @classmethod
    def groups(cls) -> Mapping[str, type[Any]]: ...


def explain(kind: type[ConfigClass], error: ValidationError, catalogue: str) -> str:
    """Every problem of the values of a `kind`. catalogue: what lists all fields."""
    return "; ".join(_explain(kind, problem, catalogue) for problem in error.errors())


def did_you_mean(field: str, kind: type[ConfigClass]) -> str:
    """The field of `kind` that the name probably means, in parentheses, or an empty string."""
    names = _dotted_names(kind)
    similar = similar_name(field.rpartition(".")[2], names)
    return f" (did you mean {names[similar]}?)" if similar else ""


def _dotted_names(kind: type[ConfigClass]) -> dict[str, str]:
    """Every field as a user writes it, by its own name; `train.use_gpu` of a sweep by `use_gpu`."""
    inner, outer = dict[str, str](), dict[str, str]()
    for name, field in kind.flat_fields().items():
        outer[name] = name
        nested: Any = field.annotation
        if _is_config(nested):
            inner |= {other: f"{name}.{other}" for other in nested.flat_fields()}
    return {**inner, **outer}


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "flat_fields")


def is_union(annotation: Any) -> bool:
    """Whether a type is a union, such as an optional one."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _explain(kind: type[ConfigClass], problem: Any, catalogue: str) -> str:
    """One pydantic error as field, value and remedy."""
    field = _flat_name(kind, problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field{did_you_mean(field, kind)}; {catalogue} lists them all"
    if problem["type"] == "missing":
        return f"{field}: required and not given; add {field}=…"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    remedy = problem["msg"].removeprefix("Input ").removeprefix("String ")
    return f"{field}={format_value(problem['input'])}: {remedy}"


def _flat_name(kind: Any, location: Sequence[int | str]) -> str:
    """The location of an error as the user writes it: dotted, without the names of groups."""
    parts = []
    for part in location:
        if _is_config(kind) and part in kind.groups():
            kind = kind.groups()[part]
            continue
        if isinstance(part, str) and is_union(kind):
            break  # the parts that follow are members of the union
        parts.append(str(part))
        fields = kind.model_fields if _is_config(kind) else {}
        kind = fields[part].annotation if part in fields else None
    return ".".join(parts)

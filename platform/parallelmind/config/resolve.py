"""From flat values and `key=value` overrides to a validated configuration."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import ValidationError
from yaml import YAMLError

from parallelmind.config.frozen import FrozenConfig, GroupedConfig
from parallelmind.config.other_names import similar_name
from parallelmind.config.yaml_file import parse_yaml
from parallelmind.errors import UserError, first_line, format_value
from parallelmind.redaction import HIDDEN, has_hidden_part

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


def resolve(
    kind: type[ConfigT], values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config"
) -> ConfigT:
    """Validate `values` with `key=value` overrides on top as a configuration of class `kind`.

    A dotted key sets a value inside a mapping (`train.max_steps=2`). Mappings are merged, other values are
    replaced. The value of a text field is literal, except `null`; other values are YAML.

    Raises:
        UserError: one line with every problem, each as field, value and remedy.
    """
    merged = dict(values)
    try:
        for override in overrides:
            key, _, text = override.partition("=")
            _set(merged, key.split("."), text if _is_literal(kind, key, text) else parse_yaml(text))
    except YAMLError as error:
        raise UserError(
            f"{source}: cannot read the overrides {' '.join(overrides)} ({first_line(error)}); "
            "write key=value"
        ) from error
    _refuse_hidden_passwords(merged)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise UserError("; ".join(_explain(kind, problem) for problem in error.errors())) from error


def _refuse_hidden_passwords(values: Mapping[str, Any]) -> None:
    """Raise UserError for a URI without its password, as config.yaml has it. MLflow may get its own later."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _refuse_hidden_passwords(value)
        elif isinstance(value, str) and name != "mlflow_uri" and has_hidden_part(value):
            raise UserError(
                f"{name}={value}: passwords are not stored; give {name} again, with what stands for {HIDDEN}"
            )


def did_you_mean(field: str, kind: type[FrozenConfig]) -> str:
    """The field of `kind` that the name probably means, in parentheses, or an empty string."""
    names = _dotted_names(kind)
    similar = similar_name(field.rpartition(".")[2], names)
    return f" (did you mean {names[similar]}?)" if similar else ""


def _dotted_names(kind: type[FrozenConfig]) -> dict[str, str]:
    """Every field as a user writes it, by its own name; `train.use_gpu` of a sweep by `use_gpu`."""
    inner, outer = dict[str, str](), dict[str, str]()
    for name, field in kind.flat_fields().items():
        outer[name] = name
        if isinstance(field.annotation, type) and issubclass(field.annotation, FrozenConfig):
            inner |= {other: f"{name}.{other}" for other in field.annotation.flat_fields()}
    return {**inner, **outer}


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value in nested mappings, which are copied before they change."""
    key, *rest = path
    current = values.get(key)
    if rest:
        values[key] = dict(current) if isinstance(current, Mapping) else {}
        _set(values[key], rest, value)
    elif isinstance(current, Mapping) and isinstance(value, Mapping):
        values[key] = dict(current)
        for name, inner in value.items():
            _set(values[key], [name], inner)
    else:
        values[key] = value


def _is_literal(kind: type[FrozenConfig], name: str, text: str) -> bool:
    """Whether an override is the text of a text field; `null` switches an optional text off."""
    field = kind.flat_fields().get(name)
    if field is None or text == "null":
        return False
    annotation = without_metadata(field.annotation)
    members = typing.get_args(annotation) if _is_union(annotation) else ()
    return annotation is str or str in map(without_metadata, members)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def without_metadata(annotation: Any) -> Any:
    """The type that `Annotated` describes further; any other type unchanged."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _explain(kind: type[FrozenConfig], problem: Any) -> str:
    """One pydantic error as field, value and remedy."""
    field = _flat_name(kind, problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field{did_you_mean(field, kind)}; --help lists them all"
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
        if isinstance(kind, type) and issubclass(kind, GroupedConfig) and part in kind.groups():
            kind = kind.groups()[str(part)]
            continue
        if isinstance(part, str) and _is_union(kind):
            break  # the parts that follow are members of the union
        parts.append(str(part))
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, FrozenConfig) else {}
        kind = fields[part].annotation if part in fields else None
    return ".".join(parts)

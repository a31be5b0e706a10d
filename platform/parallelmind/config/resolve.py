"""From flat values and `key=value` overrides to a validated configuration."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import ValidationError
from yaml import YAMLError

from parallelmind.config.explain import explain, is_union
from parallelmind.config.frozen import FrozenConfig
from parallelmind.config.yaml_file import parse_yaml
from parallelmind.errors import UserError, first_line
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
        raise UserError(explain(kind, error, "--help")) from error


def _refuse_hidden_passwords(values: Mapping[str, Any]) -> None:
    """Raise UserError for a URI without its password, as config.yaml has it. MLflow may get its own later."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _refuse_hidden_passwords(value)
        elif isinstance(value, str) and name != "mlflow_uri" and has_hidden_part(value):
            raise UserError(
                f"{name}={value}: passwords are not stored; give {name} again, with what stands for {HIDDEN}"
            )


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
    members = typing.get_args(annotation) if is_union(annotation) else ()
    return annotation is str or str in map(without_metadata, members)


def without_metadata(annotation: Any) -> Any:
    """The type that `Annotated` describes further; any other type unchanged."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation

"""Settings as YAML: values on the command line, and config files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from parallelmind.config.frozen import FrozenConfig
from parallelmind.errors import UserError, first_line
from parallelmind.redaction import redact_values
from parallelmind.storage import atomic_file, similar_path

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?)$""",
    re.VERBOSE,
)
_YAML_1_1_BOOLEANS = frozenset("y n yes no on off true false".split())


class _Loader(yaml.CSafeLoader):
    """Safe loader that reads `2e-4` as a float (YAML 1.2), and a date as text; refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    "while constructing a mapping", node.start_mark, f"found duplicate key {key}"
                )
        return super().construct_mapping(node, deep=deep)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


def _construct_sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
# Containers are built at once, so that one that contains itself is refused.
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _construct_sequence)


class _Dumper(yaml.CSafeDumper):
    """Safe dumper that quotes every text which a reader of YAML or Python could take for another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    quote = text.lower() in _YAML_1_1_BOOLEANS or _is_number(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quote else None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML document; None for an empty one. Raises YAMLError."""
    return yaml.load(text, Loader=_Loader)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if the file cannot be read as one."""
    try:
        return yaml_values(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise UserError(
            f"config={path}: no such file{similar_path(str(path))}; "
            "give the path of a YAML file or of an experiment"
        ) from error
    except OSError as error:
        raise UserError(
            f"config={path}: cannot be read ({error.strerror or error}); give a YAML file"
        ) from error


def yaml_values(content: bytes, source: object) -> dict[str, Any]:
    """The mapping in the content of a YAML file. Raises UserError, naming `source`, if it holds none."""
    try:
        values = parse_yaml(content.decode())
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config={source}: not valid YAML ({first_line(error)}); correct the file") from error
    if values is None and content.strip():  # comments alone
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config={source}: holds no mapping; write one `field: value` per line")
    return {str(key): value for key, value in values.items()}


def save_yaml(config: FrozenConfig, path: Path) -> None:
    """Write every field, so that the file gives the same run again. An existing file is replaced whole.

    Passwords in URIs are not written: see `parallelmind.redaction`.
    """
    with atomic_file(path) as file:
        file.write(dump_yaml(redact_values(config.model_dump(mode="json"))))


def dump_yaml(values: dict[str, Any]) -> str:
    """A mapping as YAML, in its own order."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False)

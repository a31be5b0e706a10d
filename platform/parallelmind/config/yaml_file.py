"""Settings in YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from parallelmind.config import FrozenConfig
from parallelmind.errors import UserError, first_line
from parallelmind.storage import atomic_file


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where there is none."""
    try:
        return yaml_values(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise UserError(
            f"config={path}: no such file; give the path of a YAML file or of an experiment"
        ) from error
    except OSError as error:
        raise UserError(
            f"config={path}: cannot be read ({error.strerror or error}); give a YAML file"
        ) from error


def yaml_values(content: bytes, source: object) -> dict[str, Any]:
    """The mapping in what a YAML file holds. Raises UserError, naming `source`, where there is none."""
    try:
        values = (
            OmegaConf.to_container(OmegaConf.create(content.decode()), resolve=True)
            if content.strip()
            else None
        )
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config={source}: not readable as YAML ({first_line(error)}); mend it there"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"config={source}: holds no mapping; write one `field: value` a line")
    return {str(key): value for key, value in values.items()}


def save_yaml(config: FrozenConfig, path: Path) -> None:
    """Write every field, so that the file gives the same run again; it is there whole or as it was."""
    with atomic_file(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))

"""From `EXPERIMENT|CONFIG.yaml [key=value …]` to a configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, TypeVar

from parallelmind import cli
from parallelmind.config import FrozenConfig, resolve
from parallelmind.config.yaml_file import load_yaml, yaml_values
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath, is_uri

PartT = TypeVar("PartT", bound=FrozenConfig)

_EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def read_config(kind: type[PartT], argv: list[str]) -> PartT:
    """The one experiment or YAML file that is named, with the overrides on top.

    Raises UserError for an unknown experiment, an unreadable file and a field that `kind` refuses.
    """
    named, dotlist = cli.split_args(argv)
    if len(named) > 1:
        raise UserError(f"{named[1]}: a second configuration beside {named[0]}; give one, then key=value")
    values = _values(kind, named[0]) if named else {}
    return resolve(kind, values, dotlist, source=named[0] if named else "command line")


def _values(kind: type[FrozenConfig], name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        return load_yaml(Path(name)) if not is_uri(name) else _yaml_there(name)
    path = _experiment_file(name)
    config = _load(path)
    if not isinstance(config, kind):
        raise UserError(
            f"experiment={name}: config() returns {type(config).__name__}; return {kind.__name__}"
        )
    return config.model_dump(mode="json")


def _yaml_there(uri: str) -> dict[str, Any]:
    found = RemotePath.at(uri, "config").read_bytes()
    if found is None:
        raise UserError(f"config={uri}: no such file; give the config.yaml of a run")
    return yaml_values(found, uri)


def _experiment_file(name: str) -> Path:
    """A path to a Python file, or the name of one in experiments/ here or beside this package."""
    folders = [Path("experiments"), _EXPERIMENTS]
    for path in [Path(name), *(folder / f"{name}.py" for folder in folders)]:
        if path.suffix == ".py" and path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("[!_]*.py")})
    raise UserError(
        f"experiment={name}: no such file; give one of {', '.join(known) or 'your own'}, or a YAML file"
    )


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise UserError(f"experiment={path}: has no config(); define one that returns the settings")
    return module.config()

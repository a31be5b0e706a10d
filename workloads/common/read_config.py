"""The configuration of a command line `EXPERIMENT|CONFIG.yaml [key=value …]`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, TypeVar

from parallelmind import cli
from parallelmind.config import FrozenConfig, resolve
from parallelmind.config.yaml_file import load_yaml, yaml_values
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath, is_uri
from parallelmind.storage import expand_home

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)

_EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def read_config(kind: type[ConfigT], argv: list[str]) -> ConfigT:
    """Read the experiment or YAML file, if one is named, and apply the overrides.

    Raises:
        UserError: an unknown experiment, an unreadable file, or a field that `kind` refuses.
    """
    names, overrides = cli.split_args(argv)
    if len(names) > 1:
        raise UserError(f"{names[1]}: a second configuration after {names[0]}; give one, then key=value")
    values = _read_values(kind, names[0]) if names else {}
    return resolve(kind, values, overrides, source=names[0] if names else "command line")


def _read_values(kind: type[FrozenConfig], name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        return load_yaml(Path(expand_home(name))) if not is_uri(name) else _read_remote_yaml(name)
    path = _experiment_file(name)
    config = _run_experiment(path)
    if not isinstance(config, kind):
        raise UserError(
            f"experiment={name}: config() returns {type(config).__name__}; return {kind.__name__}"
        )
    return config.model_dump(mode="json")


def _read_remote_yaml(uri: str) -> dict[str, Any]:
    content = RemotePath.at(uri, "config").read_bytes()
    if content is None:
        raise UserError(f"config={uri}: no such file; give the config.yaml of a run")
    return yaml_values(content, uri)


def _experiment_file(name: str) -> Path:
    """Resolve a path to a Python file, or the name of one in experiments/, here or of this project."""
    folders = [Path("experiments"), _EXPERIMENTS]
    for path in [Path(name), *(folder / f"{name}.py" for folder in folders)]:
        if path.suffix == ".py" and path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("[!_]*.py")})
    raise UserError(
        f"experiment={name}: no such file; give one of {', '.join(known) or 'your own'}, or a YAML file"
    )


def _run_experiment(path: Path) -> Any:
    """Import an experiment file and return what its `config()` returns."""
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise UserError(f"experiment={path}: has no config(); define one that returns the settings")
    return module.config()

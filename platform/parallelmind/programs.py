"""The programs that use this library, `workloads` and `serving`, which it does not import.

They lie beside it: in the project's folder as packages of their own, in a wheel as subpackages of it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from parallelmind.config import TrainConfig, resolve
from parallelmind.errors import UserError, format_value


def module_name(name: str) -> str:
    """The full name of a module of the programs, such as `workloads.train`."""
    return f"parallelmind.{name}" if is_installed() else name


def is_installed() -> bool:
    """Whether this is an installed wheel, which has the programs as subpackages."""
    return find_spec("parallelmind.workloads") is not None


def import_program(name: str) -> ModuleType:
    """A module of the programs. Raises UserError where only the library is."""
    if find_spec(module_name(name.partition(".")[0])) is None:
        raise UserError(f"{name}: is not installed; run `make setup`, or start in the project's folder")
    return import_module(module_name(name))


def train(config: TrainConfig | str | None = None, **fields: Any) -> Path:
    """Train a run, as `parallelmind train` does, and return the folder of its adapter or model.

    config: a TrainConfig, the name of an experiment, or a YAML file. fields: values that override its own.
    Raises UserError for anything that the user can correct. A run that has finished is not trained again.
    """
    if isinstance(config, TrainConfig):
        resolved = resolve(TrainConfig, {**config.model_dump(), **fields})
    else:
        overrides = [f"{name}={format_value(value)}" for name, value in fields.items()]
        read_config = import_program("workloads.common.read_config").read_config
        resolved = read_config(TrainConfig, [config, *overrides] if config else overrides)
    run_dir = import_program("workloads.train.run").run_training(resolved)
    return Path(run_dir.result.local)


def main() -> None:
    """The command `parallelmind`."""
    try:
        program = import_program("workloads.__main__")
    except UserError as error:
        sys.exit(f"error: {error}")
    program.main()


if __name__ == "__main__":
    main()

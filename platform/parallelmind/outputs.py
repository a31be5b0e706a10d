"""Outputs never replace inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from parallelmind.errors import UserError
from parallelmind.storage import expand_home


def check_output(output: str | Path, field: str, **inputs: Iterable[str | Path | None]) -> None:
    """Raise UserError if `output` is an input, is a file or folder in an input folder, or holds an input.

    field: the config field that names the output. inputs: local paths by config field; None, URIs and hub ids
    are passed over. Symbolic links are followed. Folders in an input folder may take outputs.
    """
    target = _real(output)
    for name, paths in inputs.items():
        for path in paths:
            if path is None or not os.path.exists(expand_home(str(path))):
                continue
            if relation := _relation(target, _real(path)):
                raise UserError(f"{field}={output}: {relation} {name}={path}; give another path")


def _relation(target: Path, source: Path) -> str | None:
    if target == source:
        return "is"
    if target.parent == source and source.is_dir():
        return "lies in"
    return "holds" if source.is_relative_to(target) else None


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(expand_home(str(path))))

"""Where an adapter is: its own folder, the folder of its run, or the newest of several runs."""

from __future__ import annotations

import os
from glob import glob, has_magic

from parallelmind.storage import expand_home

_SETTINGS, _RESULT = "adapter_config.json", "adapter"


def locate_adapter(path: str) -> str:
    """The adapter that a local path means; other paths, names and URIs stay as they are.

    The folder of a finished run means the adapter in it. A pattern (`runs/demo-*`) means the newest adapter
    among what it matches.
    """
    path = expand_home(path)
    if "://" in path:
        return path
    if os.path.exists(path) or not has_magic(path):
        return _result_of(path) or path
    adapters = [adapter for match in glob(path) if (adapter := _result_of(match))]
    return max(adapters, key=_saved_at, default=path)


def _result_of(folder: str) -> str | None:
    """The adapter that a folder is or, as the folder of a run, holds."""
    candidates = (folder, os.path.join(folder, _RESULT))
    return next((path for path in candidates if os.path.isfile(os.path.join(path, _SETTINGS))), None)


def _saved_at(adapter: str) -> float:
    return os.path.getmtime(os.path.join(adapter, _SETTINGS))

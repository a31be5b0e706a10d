"""Names of base models: smollm2-135m, local folders and hub ids. Imports no model library."""

from __future__ import annotations

import re
from pathlib import Path

from parallelmind.errors import UserError, translate_read_errors
from parallelmind.storage import expand_home, similar_path

SMOLLM2 = "smollm2-135m"

_HUB_ID = re.compile(r"(?!.*(--|\.\.|[.-]$|[.-]/))[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_base_name(name: str) -> None:
    """Raise UserError for a folder without config.json, and for what is neither a folder nor a hub id."""
    folder = Path(expand_home(name))
    with translate_read_errors("base_model", name):
        is_folder = folder.is_dir()
        has_config = (folder / "config.json").is_file()
    if is_folder and not has_config:
        raise UserError(
            f"base_model={name}: holds no config.json; give the folder that save_pretrained wrote"
        )
    if not is_folder and not is_hub_id(name):
        raise UserError(
            f"base_model={name}: no such folder{similar_path(str(folder))} and no hub id; "
            f"give {SMOLLM2}, a local folder or org/name"
        )


def is_hub_id(name: str) -> bool:
    """Whether the name can be a hub id and is not a local folder."""
    return _HUB_ID.fullmatch(name) is not None and not Path(expand_home(name)).is_dir()

"""Whether the files of a base model are complete on this machine, without fetching or loading."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError
from parallelmind.model.base_model import load_base_config, load_tokenizer, resolve_base_model
from parallelmind.model.base_name import SMOLLM2, is_hub_id
from parallelmind.model.smollm2 import smollm2_folder
from parallelmind.model.weight_check import find_file_problem
from parallelmind.storage import expand_home


def find_local_base(name: str) -> Path:
    """The folder of a complete local model. Raises UserError if files are missing or damaged."""
    folder = _local_folder(name)
    if problem := find_file_problem(folder):
        raise UserError(f"base_model={name}: {folder} is incomplete ({problem}); {_remedy(name, folder)}")
    config = ModelConfig(base_model=str(folder))
    load_base_config(config)
    load_tokenizer(config)
    return folder


def _local_folder(name: str) -> Path:
    if name == SMOLLM2:
        folder = smollm2_folder()
        if not (folder / "config.json").is_file():
            raise UserError(f"base_model={name}: is not in {folder.parent} yet; run `make model`")
        return folder
    resolve_base_model(name)  # raises for an invalid name
    if not is_hub_id(name):
        return Path(expand_home(name))
    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        raise UserError(
            f"base_model={name}: is not in the hub's cache on this machine; run `hf download {name}`"
        )
    return Path(config).parent


def _remedy(name: str, folder: Path) -> str:
    if name == SMOLLM2:
        return f"remove {folder} and run `make model`"
    return (
        f"run `hf download {name} --force-download`"
        if is_hub_id(name)
        else "save the model there again with save_pretrained"
    )

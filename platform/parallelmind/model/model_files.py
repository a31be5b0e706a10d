"""Whether the files of a base model are complete on this machine, without fetching or loading."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError, first_line
from parallelmind.model.base_model import is_hub_id, load_base_config, load_tokenizer, resolve_base_model
from parallelmind.model.smollm2 import SMOLLM2, smollm2_folder
from parallelmind.storage import expand_home

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_local_base(name: str) -> Path:
    """The folder of a complete local model. Raises UserError if files are missing or damaged."""
    folder = _local_folder(name)
    files = weight_files(folder)
    problems = [problem for file in files if (problem := _file_problem(file))]
    if problems or not files:
        problem = problems[0] if problems else f"it has no {_WEIGHTS[0]}"
        raise UserError(f"base_model={name}: {folder} is incomplete ({problem}); {_remedy(name, folder)}")
    config = ModelConfig(base_model=str(folder))
    load_base_config(config)
    load_tokenizer(config)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that should hold a model's weights; empty without weights and index."""
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None or first.suffix != ".json":
        return [first] if first else []
    shards = json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


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


def _file_problem(file: Path) -> str | None:
    """The problem with a file of weights, None if there is none. The header of safetensors has its length."""
    if not file.is_file():
        return f"{file.name} is missing"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name}: {first_line(error)}"
    return None


def _remedy(name: str, folder: Path) -> str:
    if name == SMOLLM2:
        return f"remove {folder} and run `make model`"
    return (
        f"run `hf download {name} --force-download`"
        if is_hub_id(name)
        else "save the model there again with save_pretrained"
    )

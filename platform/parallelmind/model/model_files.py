"""Whether a base model lies whole on this machine. Nothing is fetched, and no weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError, first_line
from parallelmind.model.base_model import (
    SMOLLM2,
    is_hub_id,
    load_base_config,
    load_tokenizer,
    resolve_base_model,
    smollm2_folder,
)

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_local_base(name: str) -> Path:
    """The folder that holds the model. Raises UserError, with how to get it, where it is missing or not
    whole.
    """
    folder = _folder(name)
    files = weight_files(folder)
    broken = next(
        (reason for file in files if (reason := _broken(file))), None if files else f"it has no {_WEIGHTS[0]}"
    )
    if broken:
        raise UserError(f"base_model={name}: {folder} is not whole ({broken}); {_again(name, folder)}")
    inside = ModelConfig(base_model=str(folder))
    load_base_config(inside)
    load_tokenizer(inside)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Every file that the weights of a model should lie in; none where nothing says so."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None or found.suffix != ".json":
        return [found] if found else []
    parts = json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(parts))]


def _folder(name: str) -> Path:
    if name == SMOLLM2:
        folder = smollm2_folder()
        if not (folder / "config.json").is_file():
            raise UserError(f"base_model={name}: is not in {folder.parent} yet; run `make model`")
        return folder
    resolve_base_model(name)  # what has no known shape is refused
    if not is_hub_id(name):
        return Path(name).expanduser()
    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        raise UserError(
            f"base_model={name}: is not in the hub's cache on this machine; run `hf download {name}`"
        )
    return Path(config).parent


def _broken(file: Path) -> str | None:
    """What is wrong with a file of weights. The header of safetensors tells how long it must be."""
    if not file.is_file():
        return f"{file.name} is missing"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name}: {first_line(error)}"
    return None


def _again(name: str, folder: Path) -> str:
    if name == SMOLLM2:
        return f"remove {folder} and run `make model`"
    return (
        f"run `hf download {name} --force-download`"
        if is_hub_id(name)
        else "save the model there again with save_pretrained"
    )

"""Checks of a base model's weights: its files are complete, and they hold every weight of the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from parallelmind.errors import UserError, UserNotice, first_line

WEIGHTS = "model.safetensors"
_LFS_POINTER = b"version https://git-lfs"
_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path) -> list[Path]:
    """The files that should hold a model's weights; empty without weights and index.

    Raises ValueError for a damaged index.
    """
    first = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if first is None or first.suffix != ".json":
        return [first] if first else []
    try:
        shards = json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{first.name} is damaged ({error!r})") from error


def find_file_problem(folder: Path) -> str | None:
    """What is wrong with the files of weights in a folder, None if they are complete. Reads headers only."""
    try:
        files = weight_files(folder)
    except ValueError as error:
        return str(error)
    if not files:
        return f"it has no {WEIGHTS}"
    return next((problem for file in files if (problem := _file_problem(file))), None)


def _file_problem(file: Path) -> str | None:
    """The header of safetensors has the file's length. A pickle is only read by loading it."""
    if not file.is_file():
        return f"{file.name} is missing"
    if _is_lfs_pointer(file):
        return f"{file.name} is a pointer of Git LFS; run `git lfs pull` in its repository"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name}: {first_line(error)}"
    return None


def _is_lfs_pointer(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def find_pickles(folder: Path) -> list[str]:
    """Names of the files of weights that are pickles."""
    return [file.name for file in weight_files(folder) if file.suffix == ".bin"]


def check_loaded(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise UserError unless the model computes what its files say.

    It does not where an adapter is added, where a parameter was not in the files or had another shape there,
    which transformers would fill at random, and where a layer uses only some of its weights, such as
    quantised ones without their scales. Other weights that the model does not use, and buffers that were not
    in the files, are a UserNotice. name: the base model's. info: what `from_pretrained` tells about weights.
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            f"base_model={name}: holds adapter_config.json, so an adapter would be a part of the base; "
            "give a folder without it, or merge the adapter first"
        )
    remedy = "give a folder or hub id with all weights of a causal language model"
    if info["mismatched_keys"]:
        weight, stored, wanted = min(info["mismatched_keys"])
        raise UserError(
            f"base_model={name}: {weight} has shape {list(stored)} in its files, and config.json asks for "
            f"{list(wanted)}{_and_more(info['mismatched_keys'])}; {remedy}"
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if missing := info["missing_keys"] & parameters:
        raise UserError(f"base_model={name}: its files lack {min(missing)}{_and_more(missing)}; {remedy}")
    if buffers := info["missing_keys"] - parameters:
        _notice(f"base_model={name}: its files lack the buffer {min(buffers)}{_and_more(buffers)}")
    unused = info["unexpected_keys"]
    layers = {parameter.rpartition(".")[0] for parameter in parameters}
    if ignored := {weight for weight in unused if weight.rpartition(".")[0] in layers}:
        raise UserError(
            f"base_model={name}: its files hold {min(ignored)}{_and_more(ignored)}, which the layer of "
            "config.json does not use; give weights that are not quantised, with their own config.json"
        )
    if unused:
        _notice(f"base_model={name}: the model does not use {min(unused)} of its files{_and_more(unused)}")


def _and_more(items: Collection[Any]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def _notice(text: str) -> None:
    warnings.warn(UserNotice(text), stacklevel=4)

"""The files of an adapter that peft reads: its settings in adapter_config.json, and its weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import peft
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallelmind.errors import UserError, UserNotice, first_line, format_value
from parallelmind.model.manifest import WEIGHTS
from parallelmind.model.weights import to_cpu

SETTINGS = "adapter_config.json"


def write_adapter(
    folder: Path, model: PeftModel, weights: Mapping[str, Tensor], rank: int, base_model: str
) -> None:
    """Write weights and settings of the active adapter into an existing folder.

    rank: of the weights. base_model: a name or path by which peft finds it (`base_location`).
    """
    settings = cast(peft.LoraConfig, copy.copy(model.peft_config[model.active_adapter]))
    settings.r, settings.inference_mode, settings.base_model_name_or_path = rank, True, base_model
    for name, value in vars(settings).items():
        if isinstance(value, set):  # peft would write it in the order of this process's hashes
            setattr(settings, name, sorted(value))
    save_file(to_cpu(weights), folder / WEIGHTS, metadata={"format": "pt"})
    settings.save_pretrained(str(folder))


def read_settings(folder: Path) -> peft.LoraConfig:
    """peft's settings of an adapter. Raises UserError if they are damaged.

    A setting that this version of peft does not know, and that is not off, is a UserNotice.
    """
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    try:
        values = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if (kind := values.get("peft_type")) != "LORA":
            raise ValueError(f"peft_type={format_value(kind)} is not LORA")
        settings = peft.LoraConfig(**{name: values[name] for name in values.keys() & known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(folder, SETTINGS, error) from error
    if unknown := sorted(name for name, value in values.items() if name not in known and value):
        version = f"peft {peft.__version__}, which does not know it"
        text = f"lora_path={folder}: {', '.join(unknown)} of {SETTINGS} is without effect in {version}"
        warnings.warn(UserNotice(text), stacklevel=2)
    return settings


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter by their saved names. Raises UserError if they are damaged or not finite."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, WEIGHTS, error) from error
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(
                f"lora_path={folder}: {name} of {WEIGHTS} holds NaN or infinity; give another adapter, or "
                "train this one again"
            )
    return weights


def _damaged(folder: Path, name: str, error: Exception) -> UserError:
    return UserError(f"lora_path={folder}: {name} is damaged ({first_line(error)}); copy the folder again")

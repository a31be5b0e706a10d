"""Adapters that peft wrote alone, without a manifest: those of TRL, of a Trainer and of `save_pretrained`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import LoraConfig, ModelConfig
from parallelmind.errors import UserError, format_value, translate_read_errors
from parallelmind.model.adapter_files import SETTINGS, read_settings, read_weights
from parallelmind.model.manifest import MANIFEST, PICKLE, WEIGHTS
from parallelmind.model.new_tokens import new_tokens
from parallelmind.model.structure import causal_lm

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations by which the base is another one


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A saved adapter that was read and fits a model, to which `attach` adds it.

    settings: peft's. weights: by their saved names, on the CPU. fork_markers: with which it forks by itself.
    """

    folder: Path
    settings: peft.LoraConfig
    weights: Mapping[str, Tensor]
    fork_markers: Sequence[str] = ()


def is_peft_alone(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft without a manifest of ours.

    Raises UserError if it cannot be read.
    """
    with translate_read_errors("lora_path", folder):
        return (folder / SETTINGS).is_file() and not (folder / MANIFEST).is_file()


def peft_values(folder: Path, lora_rank: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The base model of such an adapter, as a field of ModelConfig.

    Raises UserError if the adapter has another rank, and if the rope settings of its training are not given.
    """
    saved = read_settings(folder)
    if lora_rank not in (None, saved.r):
        raise UserError(f"lora_rank={lora_rank}: the adapter has lora_rank={saved.r}; use that value")
    if settings.get("patch_rope") is not False and "rope_2d_ratio" not in settings:
        raise UserError(
            f"lora_path={folder}: no {MANIFEST} in it, as where peft wrote it; name the rope settings of "
            "its training (rope_2d_ratio=…, and what was not the default), or patch_rope=False for plain LoRA"
        )
    return {"base_model": saved.base_model_name_or_path} if saved.base_model_name_or_path else {}


def read_peft_folder(model: PreTrainedModel, folder: Path) -> SavedAdapter:
    """Read an adapter that peft wrote alone. Raises UserError for a pickle and a base that peft changed."""
    settings = read_settings(folder)
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        raise UserError(
            f"lora_path={folder}: {PICKLE} is a pickle, which could run code; save the adapter as safetensors"
        )
    _check_base_unchanged(f"lora_path={folder}", settings)
    settings.base_model_name_or_path, settings.inference_mode = model.name_or_path or None, True
    return SavedAdapter(folder, settings, read_weights(folder))


def base_of(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """The base of a model. Raises UserError if the model does not know where it was loaded from."""
    base = causal_lm(model)
    if not base.name_or_path:
        raise UserError(
            "base_model: the model was not loaded from files; give base=ModelConfig(base_model=…)"
        )
    return ModelConfig(base_model=base.name_or_path, add_tokens=new_tokens(base, tokenizer))


def lora_of(model: PeftModel) -> LoraConfig:
    """The settings of the active adapter. Raises UserError for one that is not LoRA."""
    settings = cast(peft.LoraConfig, model.peft_config[model.active_adapter])
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(f"peft_type={settings.peft_type.value}: is not LORA; train a LoRA adapter")
    _check_base_unchanged("model", settings)
    targets = settings.target_modules or []
    names = [targets] if isinstance(targets, str) else sorted(targets)
    return LoraConfig(
        lora_rank=settings.r,
        lora_alpha=int(settings.lora_alpha),
        lora_dropout=settings.lora_dropout,
        lora_targets=",".join(re.sub(r"\s", "", name) for name in names),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def _check_base_unchanged(owner: str, settings: peft.LoraConfig) -> None:
    initialisation = settings.init_lora_weights
    if isinstance(initialisation, str) and initialisation.startswith(_CHANGES_BASE):
        raise UserError(
            f"{owner}: init_lora_weights={format_value(initialisation)} has changed the base; save it with "
            "peft's path_initial_model_for_weight_conversion"
        )

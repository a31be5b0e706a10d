"""Adapters with modules that the patch added to the model, on disk and on a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from tiny import save_tiny, tiny_tokenizer

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.model.adapter import attach, read_saved, save_adapter
from parallelmind.model.adapter_copy import is_movable, move_adapter, shared_copy


def save_two(root: Path, make: Callable[[int], PeftModel], rope: RopeConfig, lora: LoraConfig) -> Path:
    """Save a base in `base` and the adapters of seeds 0 and 1 in `0` and `1`; returns `root`."""
    base = ModelConfig(base_model=save_tiny(root / "base"))
    for seed in range(2):
        save_adapter(make(seed), tiny_tokenizer(), root / str(seed), base, rope, lora)
    return root


def attach_by_copy(model: Any, folder: Path, name: str) -> PeftModel:
    """Attach a saved adapter to a copy of the model, and move it onto the model."""
    adapted = attach(shared_copy(model), read_saved(model, tiny_tokenizer(), folder), name).eval()
    assert is_movable(adapted)
    moved = move_adapter(adapted, model, name)
    assert moved is not None
    return moved

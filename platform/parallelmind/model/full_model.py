"""Whole models as folders that transformers loads, with the manifest that says how they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import ModelConfig, RopeConfig
from parallelmind.model.base_model import no_progress_bars
from parallelmind.model.card import write_card
from parallelmind.model.manifest import check_replaceable, write_manifest
from parallelmind.model.weights import to_cpu, trained_weights
from parallelmind.storage import atomic_dir


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base: ModelConfig,
    rope: RopeConfig,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the whole model; the folder appears whole, in place of what parallelmind wrote there before.

    base: what it was trained from. weights: to write in place of the model's own, by the names of
    `trained_weights`. Raises UserError if `folder` holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_dir(folder) as built:
        write_model(model, tokenizer, built, base, rope, extra, weights)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base: ModelConfig,
    rope: RopeConfig,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """`save_model` into an empty folder that is there."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    state = to_cpu({**(trained_weights(model) if weights is None else weights), **buffers})
    with no_progress_bars():
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    manifest = write_manifest(folder, base.base_model, model.config, tokenizer, rope, None, extra)
    write_card(folder, manifest, base)

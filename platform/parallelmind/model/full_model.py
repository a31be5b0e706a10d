"""Whole models as folders that transformers loads, with a manifest and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import ModelConfig, RopeConfig
from parallelmind.model.card import write_card
from parallelmind.model.hf_compat import delayed_progress_bars
from parallelmind.model.manifest import check_replaceable, write_manifest
from parallelmind.model.weights import to_cpu, trained_weights
from parallelmind.outputs import check_output
from parallelmind.storage import atomic_dir


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base: ModelConfig,
    rope: RopeConfig,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    fork_markers: Sequence[str] = (),
) -> None:
    """Write the whole model atomically, in place of an earlier one that parallelmind trained.

    base: the model that was trained. weights: saved in place of the model's own, under the names of
    `trained_weights`. fork_markers: as those of `DataConfig`. Raises UserError if `folder` is the base's or
    holds anything else.
    """
    folder = Path(folder)
    check_output(folder, "folder", base_model=[base.base_model])
    check_replaceable(folder, "model")
    with atomic_dir(folder) as new_folder:
        write_model(model, tokenizer, new_folder, base, rope, extra, weights, fork_markers)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base: ModelConfig,
    rope: RopeConfig,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    fork_markers: Sequence[str] = (),
) -> None:
    """`save_model` into an existing, empty folder, not atomically."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    state = to_cpu({**(trained_weights(model) if weights is None else weights), **buffers})
    with delayed_progress_bars():
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    manifest = write_manifest(
        folder, base.base_model, model.config, tokenizer, rope, None, extra, fork_markers=fork_markers
    )
    write_card(folder, manifest, base)

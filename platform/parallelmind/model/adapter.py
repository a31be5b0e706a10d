"""LoRA adapters: adding, saving, loading and resuming them, together with everything that must match when
they are loaded.

An adapter folder is what peft reads (safetensors only) plus `parallelmind.json`, the manifest, and README.md,
its card.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import GroupedConfig, LoraConfig, ModelConfig, RopeConfig, TrainConfig, resolve
from parallelmind.errors import UserError, first_line
from parallelmind.model import pissa
from parallelmind.model.base_model import load_base, load_meta_model
from parallelmind.model.card import write_card
from parallelmind.model.full_model import save_model
from parallelmind.model.hf_compat import wrap_with_adapter
from parallelmind.model.manifest import (
    WEIGHTS,
    Manifest,
    check_replaceable,
    fetch_adapter,
    read_adapter,
    read_model,
    write_manifest,
)
from parallelmind.model.patch import is_patched, patch, rope_config
from parallelmind.model.support import check_supported
from parallelmind.model.targets import excluded_modules, parse_targets
from parallelmind.model.weights import ADAPTER, load_weights, to_cpu, trained_weights
from parallelmind.storage import atomic_dir


class LoadConfig(GroupedConfig):
    """Keywords of `load_model_with_lora`."""

    model: ModelConfig
    rope: RopeConfig


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Wrap `model` with fresh float32 LoRA weights, the same for the same seed; the caller's generator is
    left alone.

    lora_init=pissa changes the base's weights too, the same way every time. Raises UserError for a target
    that the model does not have, and for what its layers cannot do.
    """
    _refuse_dora_on_8bit(model, config)
    every = config.lora_targets == "all-linear"
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules="all-linear" if every else parse_targets(model, config.lora_targets),
        exclude_modules=excluded_modules(model, every) or None,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            adapted = wrap_with_adapter(model, settings, ADAPTER)
        except ValueError as error:
            reason = first_line(error).rstrip(".")
            raise UserError(f"lora_targets={config.lora_targets}: {reason}; choose other layers") from error
        if config.lora_init == "pissa":
            pissa.initialize_pissa(adapted)
    return adapted


def _refuse_dora_on_8bit(model: PreTrainedModel | PeftModel, config: LoraConfig | None) -> None:
    if config is not None and config.use_dora and getattr(model, "is_loaded_in_8bit", False):
        raise UserError(
            "use_dora=true: loses the scales of 8-bit weights; set quantize=4bit or quantize=none"
        )


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base: ModelConfig,
    rope: RopeConfig,
    lora: LoraConfig,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter folder; it appears whole, in place of what parallelmind wrote there before.

    weights: to write in place of the model's own, by the names of `trained_weights`. The manifest tells the
    adapter as it is stored: one that began as PiSSA is a plain one of twice the rank. Raises UserError if
    `folder` holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder)
    stored, lora = pissa.to_plain_lora(model, trained_weights(model) if weights is None else weights, lora)
    settings = cast(peft.LoraConfig, copy.copy(model.peft_config[model.active_adapter]))
    settings.r, settings.inference_mode = lora.lora_rank, True
    settings.base_model_name_or_path = (
        base.base_model
    )  # as the user named it, not the path it was loaded from
    with atomic_dir(folder) as built:
        save_file(to_cpu(stored), built / WEIGHTS, metadata={"format": "pt"})
        settings.save_pretrained(str(built))
        config = cast(PreTrainedModel, model.get_base_model()).config
        manifest = write_manifest(built, base.base_model, config, tokenizer, rope, lora, extra)
        write_card(built, manifest, base)


def save_trained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    config: TrainConfig,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what a run trained: the adapter (`save_adapter`) or, where there is none, the whole model
    (`save_model`).
    """
    base, rope = config.model, config.rope
    if isinstance(model, PeftModel):
        save_adapter(model, tokenizer, folder, base, rope, config.lora, extra, weights)
    else:
        save_model(cast(PreTrainedModel, model), tokenizer, folder, base, rope, extra, weights)


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> PeftModel:
    """Put a saved adapter on a base model that is patched as the adapter's was; frozen, eval mode.

    Raises UserError naming both values where base architecture, chat template or a rope field differ.
    """
    return _put_on(model, tokenizer, folder, read_adapter(folder), {}).eval()


def add_adapter(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, name: str
) -> PeftModel:
    """Put a saved adapter beside those that the model has, under a name of its own. Raises UserError as
    `load_adapter`.
    """
    return _put_on(model, tokenizer, folder, read_adapter(folder), {}, name).eval()


def resume_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, lora: LoraConfig
) -> PeftModel:
    """Put a saved adapter on the base, as `load_adapter` does, to train it further in float32.

    Raises UserError as `load_adapter`, and where a field of `lora` differs; the dropout alone may be another.
    """
    manifest = read_adapter(folder)
    manifest.check_settings(lora.model_dump(exclude={"lora_dropout"}))
    return _put_on(
        model, tokenizer, folder, manifest, {"inference_mode": False, "lora_dropout": lora.lora_dropout}
    )


def _put_on(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    manifest: Manifest,
    changes: Mapping[str, Any],
    name: str = ADAPTER,
) -> PeftModel:
    """`changes`: fields of peft's settings that are not to be as they were saved."""
    folder = fetch_adapter(folder)
    rope = rope_config(model) if is_patched(model) else manifest.rope.model_copy(update={"patch_rope": False})
    manifest.check_settings(rope.model_dump())
    manifest.check_base(model.config, tokenizer)
    _refuse_dora_on_8bit(model, manifest.lora)
    settings = cast(peft.LoraConfig, peft.PeftConfig.from_pretrained(str(folder)))
    settings.base_model_name_or_path = (
        model.name_or_path or None
    )  # the manifest has told that it is the right one
    for field, value in changes.items():
        setattr(settings, field, value)
    adapted = wrap_with_adapter(model, settings, name)
    load_weights(adapted, load_file(folder / WEIGHTS), f"lora_path={folder}", name)
    return adapted


def load_model_with_lora(
    base_model: str | None = None,
    lora_path: str | Path | None = None,
    lora_rank: int | None = None,
    *,
    attn_implementation: str | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A patched model with its adapter, and the tokenizer; without `lora_path` the patched base model alone.

    base_model: by default the adapter's own. settings: fields of RopeConfig, by default those of the adapter,
    or of the training of the whole model in the folder `base_model`; `dtype` (a name or torch's own);
    `quantize`; `trust_remote_code`. Raises UserError for an unknown field and for a value that contradicts
    what was trained.
    """
    if isinstance(settings.get("dtype"), torch.dtype):
        settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
    given = settings if base_model is None else {**settings, "base_model": str(base_model)}
    if lora_path is not None:
        lora_path = fetch_adapter(lora_path)
        manifest = read_adapter(lora_path)
        manifest.check_settings(settings if lora_rank is None else {**settings, "lora_rank": lora_rank})
        given = {"base_model": manifest.base_model, **manifest.rope.model_dump(), **given}
    elif lora_rank is not None:
        raise UserError(
            f"lora_rank={lora_rank}: needs lora_path, the adapter of that rank; without one leave lora_rank out"
        )
    elif base_model is not None and (tuned := read_model(base_model)):
        tuned.check_settings(settings)
        given = {**tuned.rope.model_dump(), **given}
    config = resolve(LoadConfig, given, source="load_model_with_lora")
    base = config.model
    if config.rope.patch_rope:
        check_supported(load_meta_model(base))  # before any weight is read
    model, tokenizer = load_base(base, attn_implementation)
    if config.rope.patch_rope:
        patch(model, config.rope)
    return (model if lora_path is None else load_adapter(model, tokenizer, lora_path)), tokenizer

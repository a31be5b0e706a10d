"""LoRA adapters: adding, saving, loading and resuming.

An adapter folder holds what peft reads (safetensors only), `parallelmind.json`, the manifest, and README.md,
the model card. Loading checks that base model, chat template and placement are those of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import GroupedConfig, LoraConfig, ModelConfig, RopeConfig, TrainConfig, resolve
from parallelmind.errors import UserError, first_line
from parallelmind.model import branch_embedding, penalty, pissa
from parallelmind.model.adapter_files import read_settings, read_weights, write_adapter
from parallelmind.model.base_identity import base_identity, sample_weights
from parallelmind.model.base_model import base_location, load_base, load_meta_model
from parallelmind.model.card import write_card
from parallelmind.model.fork_markers import set_fork_markers
from parallelmind.model.full_model import save_model
from parallelmind.model.hf_compat import wrap_with_adapter
from parallelmind.model.manifest import (
    check_replaceable,
    fetch_adapter,
    read_adapter,
    read_model,
    write_manifest,
)
from parallelmind.model.new_tokens import trainable_token_indices
from parallelmind.model.patch import patch
from parallelmind.model.patch_state import is_patched, rope_config
from parallelmind.model.peft_folder import (
    SavedAdapter,
    base_of,
    is_peft_alone,
    lora_of,
    peft_values,
    read_peft_folder,
)
from parallelmind.model.penalty import check_takes_penalties
from parallelmind.model.structure import to_device
from parallelmind.model.support import check_supported
from parallelmind.model.targets import excluded_modules, parse_targets
from parallelmind.model.weights import ADAPTER, load_weights, trained_weights
from parallelmind.storage import atomic_dir


class LoadConfig(GroupedConfig):
    """Keywords of `load_model_with_lora`."""

    model: ModelConfig
    rope: RopeConfig
    device: str | None = Field(None, description="where the model computes, such as cuda; null: the CPU")


_LOADED_TO_CPU = {"dtype": "float32"}


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Wrap `model` with untrained float32 LoRA weights; the global random generator is not advanced.

    The same seed gives the same weights. lora_init=pissa also changes the base's weights, in the same way
    each time. Raises UserError for a target that the model does not have, and for a setting that its layers
    do not support.
    """
    _check_dora(model, config)
    tokens, own_modules = trainable_token_indices(model), _modules_to_save(model)
    if tokens and branch_embedding.NAME in own_modules:
        raise UserError("branch_embeddings: not supported with add_tokens; drop one of them")
    sample_weights(model)
    all_linear = config.lora_targets == "all-linear"
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules="all-linear" if all_linear else parse_targets(model, config.lora_targets),
        exclude_modules=excluded_modules(model, all_linear) or None,
        trainable_token_indices=tokens,
        modules_to_save=own_modules or None,
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


def _modules_to_save(model: PreTrainedModel) -> list[str]:
    """The modules that the patch added, of which an adapter has its own copies."""
    present = {name.rpartition(".")[-1] for name, _ in model.named_modules()}
    return [name for name in (penalty.NAME, branch_embedding.NAME) if name in present]


def _check_holds_modules(stored: Mapping[str, Tensor], model: PeftModel) -> None:
    """Raise UserError if an adapter lacks weights of its own for a module that the patch added."""
    for name in _modules_to_save(cast(PreTrainedModel, model.get_base_model())):
        if not any(name in weight for weight in stored):
            raise UserError(
                f"modules_to_save: the adapter has no {name} of its own; "
                f'give peft.LoraConfig modules_to_save=["{name}"]'
            )


def _check_dora(model: PreTrainedModel | PeftModel, config: LoraConfig | None) -> None:
    if config is not None and config.use_dora and getattr(model, "is_loaded_in_8bit", False):
        raise UserError("use_dora=true: not supported on 8-bit weights; set quantize=4bit or quantize=none")


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base: ModelConfig | None = None,
    rope: RopeConfig | None = None,
    lora: LoraConfig | None = None,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    fork_markers: Sequence[str] = (),
) -> None:
    """Write the adapter folder atomically, in place of an earlier adapter.

    base, rope, lora: by default those that the model itself tells. weights: saved in place of the model's
    own, under the names of `trained_weights`. fork_markers: as those of `DataConfig`. The manifest describes
    the adapter as stored: one that started as PiSSA is stored as a plain adapter of twice the rank. Raises
    UserError if `folder` holds anything else, and for a model that does not tell what is not given.
    """
    folder = Path(folder)
    check_replaceable(folder, "adapter")
    base = base or base_of(model, tokenizer)
    rope = rope or (rope_config(model) if is_patched(model) else RopeConfig(patch_rope=False))
    lora = lora or lora_of(model)
    stored, lora = pissa.to_plain_lora(model, trained_weights(model) if weights is None else weights, lora)
    _check_holds_modules(stored, model)
    with atomic_dir(folder) as new_folder:
        write_adapter(new_folder, model, stored, lora.lora_rank, base_location(base.base_model))
        base_model = cast(PreTrainedModel, model.get_base_model())
        if base.add_tokens:
            tokenizer.save_pretrained(new_folder)
        identity = base_identity(base_model, tokenizer)
        manifest = write_manifest(
            new_folder,
            base.base_model,
            base_model.config,
            tokenizer,
            rope,
            lora,
            extra,
            identity,
            base.add_tokens,
            fork_markers,
        )
        write_card(new_folder, manifest, base)


def save_trained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    config: TrainConfig,
    extra: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the result of a run: an adapter (`save_adapter`) or a whole model (`save_model`)."""
    base, rope, markers = config.model, config.rope, config.data.fork_markers
    if isinstance(model, PeftModel):
        save_adapter(model, tokenizer, folder, base, rope, config.lora, extra, weights, markers)
    else:
        save_model(cast(PreTrainedModel, model), tokenizer, folder, base, rope, extra, weights, markers)


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> PeftModel:
    """Add a saved adapter to a base model that is patched as in training; frozen, in eval mode.

    Raises UserError with both values where the base model, its tokenizer or a rope field differ.
    """
    saved = read_saved(model, tokenizer, folder)
    adapted = attach(model, saved).eval()
    set_fork_markers(adapted, saved.fork_markers)
    return adapted


def resume_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, lora: LoraConfig
) -> PeftModel:
    """Add a saved adapter as `load_adapter` does, trainable in float32.

    Raises UserError as `load_adapter` does, and for a field of `lora` other than lora_dropout that differs.
    """
    read_adapter(folder).check_settings(lora.model_dump(exclude={"lora_dropout"}))
    saved = read_saved(model, tokenizer, folder)
    saved.settings.inference_mode, saved.settings.lora_dropout = False, lora.lora_dropout
    return attach(model, saved)


def read_saved(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> SavedAdapter:
    """Read a saved adapter and check that it fits the model, which is not changed and may be in use.

    Raises UserError as `load_adapter` does, except for weights whose names or shapes differ.
    """
    folder, manifest = fetch_adapter(folder), read_adapter(folder)
    rope = rope_config(model) if is_patched(model) else manifest.rope.model_copy(update={"patch_rope": False})
    manifest.check_settings(rope.model_dump())
    base_model = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    manifest.check_base(base_model, tokenizer)
    _check_dora(model, manifest.lora)
    settings = read_settings(folder)
    settings.base_model_name_or_path = model.name_or_path or None  # the manifest's checks replace peft's
    return SavedAdapter(folder, settings, read_weights(folder), manifest.fork_markers)


def attach(model: PreTrainedModel | PeftModel, saved: SavedAdapter, name: str = ADAPTER) -> PeftModel:
    """Add a saved adapter beside those of the model. Raises UserError if its weights do not fit."""
    source = f"lora_path={saved.folder}"
    try:
        adapted = wrap_with_adapter(model, saved.settings, name)
    except ValueError as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"{source}: {reason}; load the base it was trained on") from error
    load_weights(adapted, saved.weights, source, name)
    return adapted


def load_model_with_lora(
    base_model: str | None = None,
    lora_path: str | Path | None = None,
    lora_rank: int | None = None,
    *,
    attn_implementation: str | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a patched model with its adapter, and the tokenizer. Without `lora_path`: the patched base model.

    base_model: by default the adapter's own. settings: fields of RopeConfig, by default those of the adapter,
    or of the whole model that was trained into the folder `base_model`; `dtype` (a name or a torch.dtype);
    `device`; `quantize`; `trust_remote_code`. An adapter that peft wrote alone needs the fields of its
    training. Raises UserError for an unknown field and for a value that contradicts the training.
    """
    values = {name: _as_text(value) for name, value in settings.items()}
    if base_model is not None:
        values["base_model"] = str(base_model)
    folder = None if lora_path is None else fetch_adapter(lora_path)
    trained_values = _trained_values(base_model, folder, lora_rank, values)
    config = resolve(
        LoadConfig, {**_LOADED_TO_CPU, **trained_values, **values}, source="load_model_with_lora"
    )
    if config.rope.patch_rope:
        meta_model = load_meta_model(config.model)  # before any weights are read
        check_supported(meta_model)
        check_takes_penalties(meta_model, config.rope)
    model, tokenizer = load_base(config.model, attn_implementation)
    if config.rope.patch_rope:
        patch(model, config.rope)
    if trained := None if base_model is None else read_model(base_model):
        set_fork_markers(model, trained.fork_markers)
    adapted = model if folder is None else _attach_folder(model, tokenizer, folder)
    return (adapted if config.device is None else to_device(adapted, config.device)), tokenizer


def _attach_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PeftModel:
    if is_peft_alone(folder):
        return attach(model, read_peft_folder(model, folder)).eval()
    return load_adapter(model, tokenizer, folder)


def _as_text(value: Any) -> Any:
    """The name of a dtype or a device of torch; any other value as it is."""
    is_torch = isinstance(value, (torch.dtype, torch.device))
    return str(value).removeprefix("torch.") if is_torch else value


def _trained_values(
    base_model: str | None, folder: Path | None, lora_rank: int | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of the adapter's or the whole model's manifest. Raises UserError if `settings` differ."""
    if folder is not None and is_peft_alone(folder):
        return peft_values(folder, lora_rank, settings)
    if folder is not None:
        manifest = read_adapter(folder)
        manifest.check_settings(settings if lora_rank is None else {**settings, "lora_rank": lora_rank})
        base = {"base_model": manifest.base_model, "add_tokens": manifest.add_tokens}
        return {**base, **manifest.rope.model_dump()}
    if lora_rank is not None:
        raise UserError(
            f"lora_rank={lora_rank}: needs lora_path, the adapter of that rank; set it, or drop lora_rank"
        )
    if base_model is not None and (trained := read_model(base_model)):
        trained.check_settings(settings)
        return trained.rope.model_dump()
    return {}

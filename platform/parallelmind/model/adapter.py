"""LoRA adapters: adding, saving and loading them, together with everything that must match when they are loaded.

An adapter folder is what peft writes (safetensors only) plus `parallelmind.json`, the manifest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import BaseConfig, LoraConfig, RopeConfig, resolve
from parallelmind.errors import UserError, first_line
from parallelmind.model.base import load_base, load_structure
from parallelmind.model.manifest import FORMAT, MANIFEST, Manifest, base_config_hash, chat_template_hash, read_manifest
from parallelmind.model.patch import is_patched, patch, rope_config
from parallelmind.model.structure import text_modules
from parallelmind.model.support import refuse_unsupported
from parallelmind.storage import sha256, whole_folder

__all__ = ["Manifest", "add_lora", "load_adapter", "load_model_with_lora", "read_manifest", "save_adapter"]

WEIGHTS = "adapter_model.safetensors"


class _Loading(RopeConfig, BaseConfig):
    """What `load_model_with_lora` takes as keywords."""


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Wrap `model` with fresh float32 LoRA weights, the same for the same seed; the caller's generator is left alone.

    Raises UserError for a target that the model does not have.
    """
    targets: str | list[str] = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
        _refuse_unknown_targets(model, targets, config.lora_targets)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_not_adaptable(model, every=targets == "all-linear") or None,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            with _peft_warnings_off():
                return get_peft_model(model, settings)
        except ValueError as error:
            raise UserError(f"lora_targets={config.lora_targets!r}: {first_line(error)}") from error


def _not_adaptable(model: PreTrainedModel, every: bool) -> list[str]:
    """Linear layers that LoRA must leave alone: those of other towers, which text never passes. Where every layer is asked
    for, also routers of experts, which are built as linear layers but return more than one tensor, and the last layer of a
    recurrent mixer, whose kernels read the weight past the layer."""
    text = text_modules(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    odd = {name for name in linears if name not in text}
    if every:
        fused = "out_proj" if model._is_stateful else None
        odd |= {name for name, module in linears.items() if name.rpartition(".")[2] == fused or _is_router(module)}
    return sorted(odd)


@torch.no_grad()
def _is_router(linear: nn.Linear) -> bool:
    if type(linear).forward is nn.Linear.forward:
        return False
    probe = torch.zeros(1, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    return not isinstance(linear(probe), Tensor)


@contextmanager
def _peft_warnings_off() -> Iterator[None]:
    """peft still asks for an attribute that transformers has renamed, and sets ranks of its own for fused experts, of which
    it then finds none: neither is our user's business or ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def _refuse_unknown_targets(model: nn.Module, targets: list[str], given: str) -> None:
    # peft is content when one name of several matches, so a misspelt one would be left out in silence.
    layers = [name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.dim() == 2]
    unknown = [target for target in targets if not any(name == target or name.endswith(f".{target}") for name in layers)]
    if unknown or not targets:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        missing = ", ".join(unknown) or "that"
        raise UserError(f"lora_targets={given!r}: no layer is named {missing}; choose from {known}, or all-linear")


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    base: BaseConfig,
    rope: RopeConfig,
    lora: LoraConfig,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter folder; it appears whole, in place of an older adapter if there is one.

    Raises UserError if `folder` holds something other than an adapter.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"adapter folder {folder}: holds other files; give a new or empty folder, or an adapter's to replace it")
    with whole_folder(folder) as built:
        _save_peft(model, built, base.base_model)
        manifest = Manifest(
            format_version=FORMAT,
            base_model=base.base_model,
            base_config_sha256=base_config_hash(cast(PreTrainedModel, model.get_base_model()).config),
            chat_template_sha256=chat_template_hash(tokenizer),
            rope=rope,
            lora=lora,
            versions=_versions(),
            files={name: sha256(built / name) for name in ("adapter_config.json", WEIGHTS)},
            extra=dict(extra or {}),
        )
        (built / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _save_peft(model: PeftModel, folder: Path, base_model: str) -> None:
    """peft's own files, naming the base as the user did: peft would write the path it was loaded from."""
    inner = cast(PreTrainedModel, model.get_base_model())
    inner.config._name_or_path = inner.name_or_path = base_model
    model.peft_config[model.active_adapter].base_model_name_or_path = base_model
    # Left to choose, peft asks the hub whether the embeddings were resized.
    model.save_pretrained(str(folder), save_embedding_layers=False)


def trained_weights(model: PeftModel) -> dict[str, Tensor]:
    """What LoRA trains, by the names it is saved under."""
    # Left to choose, peft asks the hub whether the embeddings were resized.
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> PeftModel:
    """Put a saved adapter on a base model that is patched as the adapter's was; eval mode.

    Raises UserError naming both values where base architecture, chat template or a rope field differ.
    """
    manifest = read_manifest(folder)
    rope = rope_config(model) if is_patched(model) else manifest.rope.model_copy(update={"patch_rope": False})
    _refuse_contradictions(rope.model_dump(), manifest)
    _refuse_other("base config", base_config_hash(model.config), manifest.base_config_sha256, manifest)
    _refuse_other("chat template", chat_template_hash(tokenizer), manifest.chat_template_sha256, manifest)
    with _peft_warnings_off():
        adapted = cast(PeftModel, get_peft_model(model, peft.PeftConfig.from_pretrained(str(folder))))
    fill(adapted, load_file(Path(folder) / WEIGHTS), folder)
    return adapted.eval()


@torch.no_grad()
def fill(model: PeftModel, saved: Mapping[str, Tensor], folder: str | Path) -> None:
    """Copy saved weights into the model, all of them and by their own names.

    peft's own loading renames them as transformers renames old base checkpoints, and only warns of those that it loses.
    Raises UserError, naming the folder, where the names are not the same.
    """
    own = trained_weights(model)
    if own.keys() != saved.keys():
        odd = min(own.keys() ^ saved.keys())
        raise UserError(f"lora_path={folder}: the adapter and the model do not both have {odd}; load the base it was trained on")
    for name, weight in own.items():
        weight.copy_(saved[name])


def load_model_with_lora(
    base_model: str | None = None,
    lora_path: str | Path | None = None,
    lora_rank: int | None = None,
    *,
    attn_implementation: str | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A patched model with its adapter, and the tokenizer; without `lora_path` the patched base model alone.

    base_model: by default the adapter's own. settings: fields of RopeConfig, by default the adapter's; `dtype` (a name or
    torch's own); `trust_remote_code`. Raises UserError for an unknown field and for a value that contradicts the adapter.
    """
    if isinstance(settings.get("dtype"), torch.dtype):
        settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
    given = settings if base_model is None else {**settings, "base_model": str(base_model)}
    manifest = None
    if lora_path is not None:
        manifest = read_manifest(lora_path)
        _refuse_contradictions(settings if lora_rank is None else {**settings, "lora_rank": lora_rank}, manifest)
        given = {"base_model": manifest.base_model, **manifest.rope.model_dump(), **given}
    elif lora_rank is not None:
        raise UserError(f"lora_rank={lora_rank}: needs lora_path, the adapter of that rank; without one leave lora_rank out")
    config = resolve(_Loading, given, source="load_model_with_lora")
    base = config.part(BaseConfig)
    if config.patch_rope:
        refuse_unsupported(load_structure(base))  # before any weight is read
    model, tokenizer = load_base(base, attn_implementation)
    if config.patch_rope:
        patch(model, config.part(RopeConfig))
    return (model if lora_path is None else load_adapter(model, tokenizer, lora_path)), tokenizer


def _refuse_contradictions(given: Mapping[str, Any], manifest: Manifest) -> None:
    trained = {**manifest.rope.model_dump(), **manifest.lora.model_dump()}
    for field, value in given.items():
        if field in trained and value != trained[field]:
            raise UserError(f"{field}={value}: the adapter was trained with {field}={trained[field]}; use that value")


def _refuse_other(what: str, found: str | None, expected: str | None, manifest: Manifest) -> None:
    if found != expected:
        ours, theirs = (value[:12] if value else "none" for value in (found, expected))
        raise UserError(f"base_model: its {what} {ours} is not the adapter's {theirs}; load {manifest.base_model} instead")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("parallelmind", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from the source tree, as `ray job submit` does
            found[name] = "source"
    return found

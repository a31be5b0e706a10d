"""Names that other libraries give to our fields, and hints where one of them, or a mistyped one, is used."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from parallelmind.errors import UserError, short_repr

# Ours by theirs; of several the first that the command or function has.
_OURS: dict[str, tuple[str, ...]] = {
    "model": ("base_model",),
    "model_name": ("base_model",),
    "model_name_or_path": ("base_model",),
    "pretrained_model_name_or_path": ("base_model",),
    "adapter": ("lora_path",),
    "adapter_path": ("lora_path",),
    "adapter_name_or_path": ("lora_path", "resume_adapter"),
    "peft_model_id": ("lora_path",),
    "dataset": ("data_path",),
    "dataset_path": ("data_path",),
    "train_file": ("data_path",),
    "eval_dataset": ("validation_path",),
    "r": ("lora_rank",),
    "target_modules": ("lora_targets",),
    "torch_dtype": ("dtype",),
    "precision": ("dtype",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "load_in_4bit": ("quantize",),
    "load_in_8bit": ("quantize",),
    "quantization": ("quantize",),
    "quantization_bit": ("quantize",),
    "device": ("use_gpu", "num_gpus"),
    "device_map": ("device", "use_gpu", "num_gpus"),
    "cuda": ("device", "use_gpu", "num_gpus"),
    "gpu": ("device", "use_gpu", "num_gpus"),
    "gpus": ("use_gpu", "num_gpus"),
    "n_gpu": ("use_gpu", "num_gpus"),
    "num_gpus": ("use_gpu",),
    "use_gpu": ("device", "num_gpus"),
    "lr": ("learning_rate",),
    "lr_scheduler_type": ("schedule",),
    "max_grad_norm": ("gradient_clip",),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "per_device_train_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation_steps",),
    "finetuning_type": ("tuning",),
    "logging_steps": ("log_every",),
    "eval_steps": ("validate_every",),
    "save_steps": ("checkpoint_every",),
    "save_total_limit": ("keep_checkpoints",),
    "run_name": ("name",),
    "output": ("output_path", "output_dir"),
    "workers": ("num_workers",),
    "cutoff_len": ("max_branch_tokens",),
    "max_seq_length": ("max_branch_tokens",),
    "max_length": ("max_new_tokens", "max_branch_tokens"),
    "max_tokens": ("max_new_tokens",),
    "do_sample": ("temperature",),
    "stop_strings": ("stop",),
    "stop_sequences": ("stop",),
    "top_logprobs": ("logprobs",),
    "frequency_penalty": ("repetition_penalty",),
    "presence_penalty": ("repetition_penalty",),
}


def similar_name(name: str, known: Collection[str]) -> str | None:
    """The one of the known names that a wrong name probably means, None if it resembles none."""
    if ours := next((ours for ours in _OURS.get(name, ()) if ours in known), None):
        return ours
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def check_names(values: Mapping[str, Any], known: Collection[str], kind: str) -> None:
    """Raise UserError for the first unknown name. kind: what the names are, for the error."""
    for name, value in values.items():
        if name not in known:
            field = " ".join(str(name).split())[:40]
            similar = similar_name(field, known)
            hint = f" (did you mean {similar}?)" if similar else ""
            raise UserError(
                f"{field}={short_repr(value)}: unknown {kind}{hint}; choose from {', '.join(known)}"
            )


class NamedFields:
    """Base of dataclasses: an unknown keyword raises UserError with the field that is probably meant."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __new__(cls, *_: Any, **values: Any) -> Self:
        check_names(values, cls.__dataclass_fields__, f"field of {cls.__name__}")
        return super().__new__(cls)

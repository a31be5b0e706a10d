"""Load what an application serves: the model, its tokenizer and the length of its context."""

from __future__ import annotations

from typing import Any

import parallelmind as pm
from parallelmind.config import ModelConfig
from parallelmind.model.manifest import read_adapter
from serving.config import AppConfig


def load_model(config: AppConfig) -> tuple[Any, Any]:
    """Model and tokenizer; on the GPU if the engine reserves one.

    Raises UserError for what cannot be loaded.
    """
    from parallelmind.model.structure import to_gpu

    rope: dict[str, Any] = {
        "rope_2d_ratio": config.model.rope_2d_ratio,
        "visibility": config.model.visibility,
    }
    model, tokenizer = pm.load_model_with_lora(
        config.model.base_model,
        config.model.lora_path,
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        **{field: value for field, value in rope.items() if value is not None},
    )
    return to_gpu(model) if on_gpu(config) else model, tokenizer


def on_gpu(config: AppConfig, at_least: float = 0) -> bool:
    """Whether the engine has this much of a GPU, or any; `auto`, before it is decided, counts as none."""
    num_gpus = config.replicas.num_gpus
    return num_gpus != "auto" and num_gpus > 0 and num_gpus >= at_least


def load_tokenizer(config: AppConfig) -> Any:
    """The tokenizer alone. Raises UserError for one that cannot be loaded."""
    from parallelmind.model import base_model

    return base_model.load_tokenizer(_base_model(config))


def max_context_tokens(config: AppConfig) -> int | None:
    """Number of positions that the model supports, or None if its configuration has no such value.

    Raises UserError for a model that cannot be loaded.
    """
    from parallelmind.model import base_model

    text_config = base_model.load_base_config(_base_model(config)).get_text_config()
    return getattr(text_config, "max_position_embeddings", None)


def _base_model(config: AppConfig) -> ModelConfig:
    model = config.model
    adapter = None if model.lora_path is None else read_adapter(model.lora_path)
    return ModelConfig(
        base_model=model.base_model or (adapter.base_model if adapter else ""),
        trust_remote_code=model.trust_remote_code,
        add_tokens=adapter.add_tokens if adapter else [],
    )

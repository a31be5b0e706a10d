"""Representative tiny models: one for each mechanism of the patch, and variants that must not need one."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from parallelmind.evaluation.tiny_models import WINDOW, tiny_model

FAMILIES = {
    "shared": "llama",
    "several": "granite_swa",
    "in each attention": "moshi",
    "layer types": "gemma3_text",
    "complex": "llama4_text",
    "table in each attention": "gptj",
}

_LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0 + pair for pair in range(8)]}
_SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 64, **_LONG},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

# name: model type and the values that differ from its tiny defaults
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: ("llama", {"rope_parameters": {"rope_type": name, "rope_theta": 1e4, **rest}})
        for name, rest in _SCALED.items()
    },
    "windows beside full attention": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "windows in every layer": ("mistral", {}),
    "half of each head, interleaved": ("glm", {}),
    "interleaved": ("cohere", {}),
    "latent attention": ("deepseek_v3", {}),
    "frequencies of zero": ("gemma4_text", {}),
    "three axes of position": ("cohere_compass_text", {}),
    "the best few tokens only": ("glm_moe_dsa", {}),
}


def model_class(name: str) -> type[PreTrainedModel]:
    """The class of the model of a family or variant."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[_settings(name)[0]]]


def variant(name: str, attention: str = "eager") -> PreTrainedModel:
    """A tiny model of a family or variant."""
    model_type, differences = _settings(name)
    return tiny_model(model_type, attention, **differences)


def _settings(name: str) -> tuple[str, dict[str, Any]]:
    return VARIANTS[name] if name in VARIANTS else (FAMILIES[name], {})

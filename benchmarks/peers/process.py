"""Processes of drivers: they stay loaded and take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from benchmarks.peers.install import exported_model, folder
from benchmarks.peers.protocol import Answer, Request, encode
from parallelmind.config import ModelConfig
from parallelmind.model.base_model import resolve_base_model

_ROOT = Path(__file__).resolve().parents[2]
_CORES = sorted(os.sched_getaffinity(0))
VLLM_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; on a CPU its default is most of the memory


class EngineProcess:
    """A loaded driver. It ends with this process, when its stdin does."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        """env: variables in addition to those of this process. Every engine uses all cores."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (open while the process runs)
        self._process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(len(_CORES)), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._read_line()

    def run(self, requests: Sequence[Request]) -> Answer:
        """Decode the requests. Raises RuntimeError with the driver's log if it fails."""
        assert self._process.stdin is not None
        print(encode(requests), file=self._process.stdin, flush=True)
        return Answer(**json.loads(self._read_line()))

    def close(self) -> None:
        """End the driver and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args!r} failed:\n{self._log.read()[-4000:]}")
        return line


def start_parallelmind(settings: dict[str, Any], adapters: Sequence[Path] = ()) -> EngineProcess:
    """This project's engine as its documentation runs it on CPUs: tcmalloc preloaded.

    settings: keywords of `load_model_with_lora`.
    """
    names = [ModelConfig().base_model, json.dumps(settings), *map(str, adapters)]
    command = [sys.executable, "-m", "benchmarks.peers.parallelmind_driver", *names]
    return EngineProcess(command, {"LD_PRELOAD": find_library("tcmalloc_minimal") or ""})


def start_hf(dtype: str) -> EngineProcess:
    """Hugging Face `generate`, of this project's own venv."""
    return EngineProcess([sys.executable, "-m", "benchmarks.peers.hf_driver", base_model(), dtype])


def start_openvino(dtype: str) -> EngineProcess:
    return EngineProcess([*_driver("openvino"), str(exported_model("openvino")), dtype])


def start_vllm(dtype: str) -> EngineProcess:
    env = {**vllm_env(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return EngineProcess([*_driver("vllm"), base_model(), dtype], env)


def vllm_env() -> dict[str, str]:
    """What vLLM's documentation sets on CPUs: cores are bound, tcmalloc and Intel's OpenMP are preloaded."""
    libraries = [str(folder("vllm") / "lib" / "libiomp5.so"), find_library("tcmalloc_minimal")]
    return {
        "LD_PRELOAD": ":".join(filter(None, libraries)),
        **VLLM_CACHE,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _CORES)),
    }


def peer_python(name: str) -> str:
    """The Python of a peer's venv."""
    return str(folder(name) / "bin" / "python")


def _driver(name: str) -> list[str]:
    """The command of a driver in the venv of its peer."""
    return [peer_python(name), "-m", f"benchmarks.peers.{name}_driver"]


def base_model() -> str:
    """The folder of the default base model."""
    return resolve_base_model(ModelConfig().base_model)

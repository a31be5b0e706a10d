"""HTTP servers of their own processes, this project's and vLLM's, which can be paused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.peers.process import base_model, peer_python, vllm_env
from serving.runtime.ports import free_port

_START_S = 300
_END_S = 60


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A running server, with all of its processes."""

    url: str
    process: subprocess.Popen[str]

    def pause(self) -> None:
        """Stop all processes: two servers that run at the same time would share the cores."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        root = psutil.Process(self.process.pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def parallelmind_server(**fields: Any) -> Iterator[HttpServer]:
    """`python -m serving` with unadapted SmolLM2 and isolated branches."""
    port = free_port()
    settings = {"base_model": "smollm2-135m", "visibility": "isolated", "port": port, **fields}
    command = [sys.executable, "-m", "serving", *(f"{name}={value}" for name, value in settings.items())]
    with _running(command, port) as server:
        yield server


@contextmanager
def vllm_server(dtype: str) -> Iterator[HttpServer]:
    """vLLM's own OpenAI server, which calls the model `base`."""
    port = free_port()
    options = {
        "model": base_model(),
        "served-model-name": "base",
        "dtype": dtype,
        "max-model-len": 2048,
        "max-num-seqs": 64,
        "host": "127.0.0.1",
        "port": port,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [peer_python("vllm"), "-m", "vllm.entrypoints.openai.api_server", *flags]
    with _running(command, port, {**os.environ, **vllm_env()}) as server:
        yield server


@contextmanager
def _running(command: Sequence[str], port: int, env: Mapping[str, str] | None = None) -> Iterator[HttpServer]:
    """The server that a command starts. env: of its process; None: that of this one."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=env)
        server = HttpServer(f"http://127.0.0.1:{port}", process)
        try:
            _wait_until_ready(server, log)
            yield server
        finally:
            server.resume()  # a paused process does not end
            process.send_signal(signal.SIGINT)
            process.wait(timeout=_END_S)


def _wait_until_ready(server: HttpServer, log: Any) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.process.poll() is None:
        if _is_healthy(server.url):
            return
        time.sleep(0.2)
    log.seek(0)
    raise TimeoutError(f"the server did not start:\n{log.read()}")


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False

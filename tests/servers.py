"""`python -m serving` in a process of its own, reached by plain HTTP on a loopback port."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from processes import family
from tiny import tiny_llama, tiny_tokenizer

from serving.runtime.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
_STARTUP_S = 180
_WAIT_S = 120


def save_talker(folder: Path) -> str:
    """Save a tiny model that never ends a text by itself: an output is as long as max_tokens allows."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Server:
    """A running server. log: the file with its output."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def family(self, name: str = "") -> list[psutil.Process]:
        """Its descendant processes whose command line contains the name."""
        return family(self.process.pid, name)

    def get(self, path: str) -> tuple[int, Any]:
        return answer(self.request("GET", path))

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return answer(self.request("POST", path, body, **headers))

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        return self.connect(method, path, body, **headers).getresponse()

    def connect(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        """A connection on which the request has been sent and the response not been read."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_WAIT_S)
        content = json.dumps(body) if isinstance(body, (dict, list)) else body
        connection.request(
            method, path, content, {"content-type": "application/json", "connection": "close", **headers}
        )
        return connection

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The events of a stream; the last is "[DONE]" unless the stream was cut off."""
        with self.request("POST", path, {**body, "stream": True}) as response:
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data: "):  # not its id, nor a comment
                    text = line.decode().removeprefix("data: ").strip()
                    yield text if text == "[DONE]" else json.loads(text)

    def metric(self, name: str) -> float:
        """The sum of a metric over all processes and labels."""
        with self.request("GET", "/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith((f"parallelmind_{name}{{", f"parallelmind_{name} "))
        )


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """The addresses and ports that a process and its descendants listen on."""
    addresses = set()
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # the process has ended
            addresses |= {
                (connection.laddr.ip, connection.laddr.port)
                for connection in member.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
    return addresses


def answer(response: http.client.HTTPResponse) -> tuple[int, Any]:
    with response:
        text = response.read()
        return response.status, json.loads(text) if text else None


@contextmanager
def serving(folder: Path, complaints: bool = False, **fields: Any) -> Iterator[Server]:
    """Run a server until the end of the block, where SIGINT must end it and all of its processes.

    complaints: whether the log may hold tracebacks, as it does when processes are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, port = folder / "log", free_port()
    command = [
        sys.executable,
        "-m",
        "serving",
        f"port={port}",
        *(f"{name}={value}" for name, value in fields.items()),
    ]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT
        )
    server = Server(process, port, log)
    try:
        _wait_for_greeting(server)
        yield server
        family = server.family()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert psutil.wait_procs(family, timeout=30)[1] == []
        assert complaints or "Traceback" not in log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_for_greeting(server: Server) -> None:
    deadline = time.monotonic() + _STARTUP_S
    while time.monotonic() < deadline and server.process.poll() is None:
        if "Ctrl-C" in server.log.read_text():
            return
        time.sleep(0.2)
    raise TimeoutError(f"no server after {_STARTUP_S} s:\n{server.log.read_text()}")


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}

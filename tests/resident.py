"""Stands behind `python`, `make`, `ray` and other programs when blocks of the pages are run.

Usage:
    python resident.py stay SOCKET            run every `python -m …` in one process, which imports once
    python resident.py ask NAME ARGUMENT…     what these programs start; the socket is $READER_SOCKET
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from multiprocessing.connection import Client, Listener
from typing import Any
from unittest import mock

from docs import as_module

# Commands that cannot run in the test, by their first words. All other commands on the pages run.
NOT_HERE = {
    "pip install boto3": "needs a package index",
    "pip install wandb": "needs a package index",
    "lm_eval": "has an environment of its own; tests/integration/test_clients.py runs it",
    "wandb login": "needs an account",
    "hf auth login": "needs an account",
    "parallelmind train CONFIG.yaml push_to=USER/NAME": "needs an account",
    "parallelmind push": "needs an account",
    "ray up": "rents machines",
    "ray down": "rents machines",
    "ray dashboard": "needs a rented machine",
    "ray rsync-up": "needs a rented machine",
    "ray attach": "needs a rented machine",
    "docker": "needs a daemon and a registry",
    "kubectl": "needs Kubernetes",
}
# Fields appended to long commands: num_workers only where the page sets it, trials not to a grid.
EXTRA_FIELDS = {
    "workloads.train": ["max_steps=2", "num_workers=2"],
    "workloads.sweep": ["trials=1", "train.max_steps=2"],
}
TYPED = "Who lives in the passage?\nWho? || Where?\n"  # standard input of workloads.chat
_SCRIPTS = {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}
_RUN_TARGETS = ("demo", "serve")  # targets that run; for others `make -n` prints the recipe
_STARTUP_S = 180
_subprocess_run = subprocess.run


class Resident:
    """Runs one command or Python block at a time in this process, connected to one Ray cluster."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, ...], tuple[int, str]] = {}
        self.namespaces: dict[str, dict[str, Any]] = {}
        self.server: subprocess.Popen[bytes] | None = None
        self.serving: tuple[str, ...] = ()

    def handle(self, **request: Any) -> tuple[int, str]:
        """Run a request and return its exit code and output."""
        try:
            return self.python(**request) if "page" in request else self.command(**request)
        except Exception:
            return 1, traceback.format_exc()

    def python(self, page: str, text: str) -> tuple[int, str]:
        """Run a Python block in the namespace of its page."""
        return captured(
            lambda: exec(compile(text, page, "exec"), self.namespaces.setdefault(page, {"__name__": page}))
        )

    def command(self, module: str, arguments: list[str], fresh: bool = False) -> tuple[int, str]:
        """Run `python -m module arguments` unless the same line has succeeded before.

        With `fresh`, the line of a server that no longer runs is run again.
        """
        line = (module, *arguments)
        if line not in self.results or self.results[line][0] or (fresh and self.serving != line):
            self.results[line] = self._run(line)
        return self.results[line]

    def _run(self, line: tuple[str, ...]) -> tuple[int, str]:
        module, *arguments = line
        if module == "serving" and "--help" not in arguments:
            return self._serve(line)
        if module == "workloads.demo":
            with mock.patch.object(subprocess, "run", self._run_in_process):
                return run(module, arguments)
        return run(
            module, arguments if "--help" in arguments else [*arguments, *extra_fields(module, arguments)]
        )

    def _run_in_process(self, line: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Replacement of subprocess.run: runs `python -m …` in this process."""
        if line[:2] != [sys.executable, "-m"]:
            return _subprocess_run(line, **options)
        code, output = run(line[2], line[3:])
        print(output)
        return subprocess.CompletedProcess(line, code)

    def _serve(self, line: tuple[str, ...]) -> tuple[int, str]:
        """Replace the previous server by a new one and wait until it is healthy."""
        port = os.environ["READER_PORT"]
        command = [sys.executable, "-m", *line, f"port={port}"]
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.end_server()
        with open("server.log", "wb") as log:
            self.server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        healthy = self._becomes_healthy(f"http://127.0.0.1:{port}/health")
        self.serving = line if healthy else ()
        with open("server.log", encoding="utf-8") as log:
            return int(not healthy), log.read()

    def _becomes_healthy(self, url: str) -> bool:
        deadline = time.monotonic() + _STARTUP_S
        while self.server and self.server.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
                return bool(response.status == 200)
            time.sleep(0.2)
        return False

    def end_server(self) -> None:
        """Stop the server with SIGINT; its exit code must be 0."""
        if self.server and self.server.poll() is None:
            self.server.send_signal(signal.SIGINT)
            assert self.server.wait(timeout=60) == 0, self.serving
        self.server, self.serving = None, ()


def extra_fields(module: str, arguments: list[str]) -> list[str]:
    """Return fields that shorten a command."""
    fields = EXTRA_FIELDS.get(module, [])
    if not any(item.startswith("num_workers=") for item in arguments):
        fields = [item for item in fields if not item.startswith("num_workers=")]
    if any(item.startswith("points=") for item in arguments):  # a grid tries all of them
        fields = [item for item in fields if not item.startswith("trials=")]
    return fields


@contextmanager
def local_training() -> Iterator[None]:
    """Run a single training worker in this process, in Ray Train's local mode, with one CPU."""
    import workloads.common.ray_env  # noqa: F401  (before Ray)

    # isort: split
    import ray.train
    from ray.runtime_context import RuntimeContext

    scaling = ray.train.ScalingConfig

    def local_scaling(num_workers: Any, **options: Any) -> Any:
        return scaling(num_workers=0 if num_workers == 1 else num_workers, **options)

    with (
        mock.patch.object(ray.train, "ScalingConfig", local_scaling),
        mock.patch.object(RuntimeContext, "get_assigned_resources", return_value={"CPU": 1.0}),
    ):
        yield


def run(module: str, arguments: list[str]) -> tuple[int, str]:
    """Run `python -m module` in this process."""
    context = local_training() if module == "workloads.train" else nullcontext()
    with (
        context,
        mock.patch.multiple(sys, argv=[module, *arguments], stdin=StringIO(TYPED)),
        warnings.catch_warnings(),
    ):
        # runpy warns about modules that are already imported.
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        return captured(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def captured(call: Any) -> tuple[int, str]:
    """Call and return exit code and output."""
    output, code = StringIO(), 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            call()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, output.getvalue()


def stay(path: str) -> None:
    """Serve requests on a socket until a null request."""
    resident = Resident()
    with Listener(path, "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                request = json.loads(connection.recv_bytes())
                if request is None:
                    return resident.end_server()
                with suppress(BrokenPipeError):
                    connection.send_bytes(json.dumps(resident.handle(**request)).encode())


def ask(path: str, request: Any) -> tuple[int, str]:
    """Send a request to the resident process and return exit code and output; None ends the process."""
    with Client(path, "AF_UNIX") as connection:
        connection.send_bytes(json.dumps(request).encode())
        code, output = json.loads(connection.recv_bytes()) if request is not None else (0, "")
        return code, output


def run_program(name: str, arguments: list[str]) -> int:
    """Run a program of the scratch folder and return its exit code."""
    line = " ".join([name, *arguments])
    if reason := next((NOT_HERE[prefix] for prefix in NOT_HERE if f"{line} ".startswith(f"{prefix} ")), None):
        print(f"not here: {line}: {reason}")
        return 0
    if name == "make":
        return make(arguments)
    name, *arguments = as_module([name, *arguments])
    if name == "python" and arguments[0] == "-m":
        request = {"module": arguments[1], "arguments": arguments[2:], "fresh": "FRESH" in os.environ}
        code, output = ask(os.environ["READER_SOCKET"], request)
        print(output)
        return code
    if name in _SCRIPTS:
        return subprocess.run(
            [sys.executable, "-m", _SCRIPTS[name], *arguments], input=b"y\n", check=False
        ).returncode
    print(f"{line}: the test has no stand-in for this program")
    return 127


def make(targets: list[str]) -> int:
    """Print the recipe with `make -n`; for _RUN_TARGETS also run its last line."""
    completed = subprocess.run(
        [os.environ["READER_MAKE"], "-n", *targets], capture_output=True, text=True, check=False
    )
    print(completed.stdout + completed.stderr)
    if completed.returncode or targets[-1] not in _RUN_TARGETS:
        return completed.returncode
    return subprocess.run(["bash", "-c", completed.stdout.splitlines()[-1]], check=False).returncode


if __name__ == "__main__":
    if sys.argv[1] == "stay":
        stay(sys.argv[2])
    else:
        sys.exit(run_program(sys.argv[2], sys.argv[3:]))

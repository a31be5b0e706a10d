"""What stands behind `python`, `make`, `ray` and others in the folder of a reader of the pages.

python resident.py stay SOCKET          one process that runs every `python -m …` in itself, so that imports
are made once python resident.py ask NAME ARGUMENT…   what those words start there; the socket is
$READER_SOCKET
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

# Commands that cannot run here, by their first words. Everything else on the pages runs.
NOT_HERE = {
    "pip install boto3": "needs a package index",
    "ray up": "rents machines",
    "ray down": "rents machines",
    "ray dashboard": "needs a rented machine",
    "ray rsync-up": "needs a rented machine",
    "ray attach": "needs a rented machine",
    "docker": "needs a daemon and a registry",
    "kubectl": "needs Kubernetes",
}
# Settings behind those that are printed, for what would take long; of num_workers, only where it is printed.
BEHIND = {
    "workloads.train": ["max_steps=2", "num_workers=2"],
    "workloads.sweep": ["trials=1", "train.max_steps=2"],
}
TYPED = "Who lives in the passage?\nWho? || Where?\n"  # into workloads.chat, before its input ends
_SCRIPTS = {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}
_MADE = ("demo", "serve")  # what `make` really runs; of others it only says what it would
_STARTUP_S = 180
_start = subprocess.run


class Resident:
    """Runs a command or a page's Python at a time; all of it shares one connection to a Ray cluster."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, ...], tuple[int, str]] = {}
        self.pages: dict[str, dict[str, Any]] = {}
        self.server: subprocess.Popen[bytes] | None = None
        self.serves: tuple[str, ...] = ()

    def answer(self, **asked: Any) -> tuple[int, str]:
        try:
            return self.python(**asked) if "page" in asked else self.command(**asked)
        except Exception:
            return 1, traceback.format_exc()

    def python(self, page: str, text: str) -> tuple[int, str]:
        """A block of a page, after those before it."""
        return captured(
            lambda: exec(compile(text, page, "exec"), self.pages.setdefault(page, {"__name__": page}))
        )

    def command(self, module: str, arguments: list[str], fresh: bool = False) -> tuple[int, str]:
        """`python -m module arguments`; one that succeeded is not repeated. fresh: unless it is a server that
        has ended.
        """
        line = (module, *arguments)
        if line not in self.known or self.known[line][0] or (fresh and self.serves != line):
            self.known[line] = self._run(line)
        return self.known[line]

    def _run(self, line: tuple[str, ...]) -> tuple[int, str]:
        module, *arguments = line
        if module == "serving" and "--help" not in arguments:
            return self._serve(line)
        if module == "workloads.demo":
            with mock.patch.object(subprocess, "run", self._started):
                return run(module, arguments)
        return run(module, arguments if "--help" in arguments else [*arguments, *behind(module, arguments)])

    def _started(self, line: list[str], **how: Any) -> subprocess.CompletedProcess[Any]:
        """In place of a process that a command starts, if it is one of the project's own."""
        if line[:2] != [sys.executable, "-m"]:
            return _start(line, **how)
        code, output = run(line[2], line[3:])
        print(output)
        return subprocess.CompletedProcess(line, code)

    def _serve(self, line: tuple[str, ...]) -> tuple[int, str]:
        """A server in the background, in place of the one before, once it is well."""
        started = [sys.executable, "-m", *line]
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.end_server()
        port = os.environ["READER_PORT"]
        if port != "8000":
            started.append(f"port={port}")
        with open("server.log", "wb") as log:
            self.server = subprocess.Popen(started, env=env, stdout=log, stderr=log)
        well = self._is_well(f"http://127.0.0.1:{port}/health")
        self.serves = line if well else ()
        with open("server.log", encoding="utf-8") as log:
            return int(not well), log.read()

    def _is_well(self, url: str) -> bool:
        deadline = time.monotonic() + _STARTUP_S
        while self.server and self.server.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
                return bool(response.status == 200)
            time.sleep(0.2)
        return False

    def end_server(self) -> None:
        """As Ctrl-C does; it must end cleanly."""
        if self.server and self.server.poll() is None:
            self.server.send_signal(signal.SIGINT)
            assert self.server.wait(timeout=60) == 0, self.serves
        self.server, self.serves = None, ()


def behind(module: str, arguments: list[str]) -> list[str]:
    """Settings that make a command shorter."""
    workers = any(item.startswith("num_workers=") for item in arguments)
    return [item for item in BEHIND.get(module, []) if workers or not item.startswith("num_workers=")]


@contextmanager
def local_training() -> Iterator[None]:
    """Ray Train's local mode for one worker: it trains in this process, where a worker's imports have been
    made.
    """
    import workloads.common.ray_env  # noqa: F401  (before Ray)

    # isort: split
    import ray.train

    scaling = ray.train.ScalingConfig

    def here(num_workers: Any, **others: Any) -> Any:
        return scaling(num_workers=0 if num_workers == 1 else num_workers, **others)

    with mock.patch.object(ray.train, "ScalingConfig", here):
        yield


def run(module: str, arguments: list[str]) -> tuple[int, str]:
    """`python -m module`, in this process."""
    trains = local_training() if module == "workloads.train" else nullcontext()
    with (
        trains,
        mock.patch.multiple(sys, argv=[module, *arguments], stdin=StringIO(TYPED)),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", "'.*' found in sys.modules", RuntimeWarning
        )  # it has been imported before
        return captured(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def captured(call: Any) -> tuple[int, str]:
    """Exit code and output."""
    output, code = StringIO(), 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            call()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, output.getvalue()


def stay(path: str) -> None:
    """Answer until asked to end."""
    resident = Resident()
    with Listener(path, "AF_UNIX") as listener:
        while True:
            with listener.accept() as asker:
                asked = json.loads(asker.recv_bytes())
                if asked is None:
                    return resident.end_server()
                with suppress(BrokenPipeError):
                    asker.send_bytes(json.dumps(resident.answer(**asked)).encode())


def ask(path: str, question: Any) -> tuple[int, str]:
    with Client(path, "AF_UNIX") as resident:
        resident.send_bytes(json.dumps(question).encode())
        code, output = json.loads(resident.recv_bytes()) if question is not None else (0, "")
        return code, output


def word(name: str, arguments: list[str]) -> int:
    """What the first word of a command does in a reader's folder; returns its exit code."""
    line = " ".join([name, *arguments])
    if reason := next((NOT_HERE[known] for known in NOT_HERE if f"{line} ".startswith(f"{known} ")), None):
        print(f"not here: {line}: {reason}")
        return 0
    if name == "make":
        return make(arguments)
    if name == "python" and arguments[0] == "-m":
        question = {"module": arguments[1], "arguments": arguments[2:], "fresh": "FRESH" in os.environ}
        code, output = ask(os.environ["READER_SOCKET"], question)
        print(output)
        return code
    if name in _SCRIPTS:
        return subprocess.run(
            [sys.executable, "-m", _SCRIPTS[name], *arguments], input=b"y\n", check=False
        ).returncode
    print(f"{line}: nothing stands for it")
    return 127


def make(targets: list[str]) -> int:
    """`make -n`, and of _MADE the last line of the recipe as well."""
    done = subprocess.run(
        [os.environ["READER_MAKE"], "-n", *targets], capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr)
    if done.returncode or targets[-1] not in _MADE:
        return done.returncode
    return subprocess.run(["bash", "-c", done.stdout.splitlines()[-1]], check=False).returncode


if __name__ == "__main__":
    if sys.argv[1] == "stay":
        stay(sys.argv[2])
    else:
        sys.exit(word(sys.argv[2], sys.argv[3:]))

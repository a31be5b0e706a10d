"""A one-node Ray cluster on loopback whose Python has the dependencies but not the project.

Jobs and applications bring the project with them, as they do on a real cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from processes import kill
from servers import ROOT, Server

from serving.runtime.ports import free_port

_STARTUP_S, _WAIT_S = 180, 120
# Sets Serve's environment variables for `ray start`; runs in the Python that has the project.
_WITH_SERVE_ENV = (
    "import os, sys; from serving.runtime.ray_env import set_serve_env; set_serve_env(); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def bare_python(folder: Path) -> Path:
    """A virtual environment that sees the installed packages, but not the editable install of this project.

    A folder named in a .pth file is on the path, but .pth files inside it, such as ours, are not read.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "dependencies.pth").write_text(
        sysconfig.get_path("purelib")
    )
    python = folder / "bin" / "python"
    completed = subprocess.run(
        [python, "-c", "import ray, torch; import parallelmind"], capture_output=True, text=True, cwd=folder
    )
    assert "No module named 'parallelmind'" in completed.stderr
    return python


def environment(python: Path, **settings: str) -> dict[str, str]:
    """Environment of a process of the cluster. settings: more variables.

    A job finds `python` on the PATH of the shell that started the cluster.
    """
    defaults = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    # RAY_SERVE_: this process may have set ports for a server of its own (serving/runtime/ray_env.py).
    # MAKE: `make test` may run this process. OMP_NUM_THREADS: threads are those of the reserved CPUs.
    removed = (
        "RAY_ADDRESS",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "RAY_SERVE_",
        "MAKE",
        "MFLAGS",
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    return {**inherited, **defaults, "PATH": f"{python.parent}:{os.environ['PATH']}", **settings}


@contextmanager
def cluster(
    python: Path,
    cpus: int = 2,
    serves: bool = False,
    gcs_port: int | None = None,
    options: Sequence[str] = (),
    **settings: str,
) -> Iterator[Server]:
    """A running cluster; yields its dashboard. Kills only its own processes afterwards.

    serves: set the variables of serving/runtime/ray_env.py. gcs_port: the port that nodes join; None: a free
    one. options: more options of `ray start`. settings: more environment variables.
    """
    port = free_port()
    line: list[str | Path] = [
        *((sys.executable, "-c", _WITH_SERVE_ENV) if serves else ()),
        *(
            python,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--num-cpus={cpus}",
            "--node-ip-address=127.0.0.1",
        ),
        *(
            f"--port={gcs_port or free_port()}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={port}",
            "--disable-usage-stats",
        ),
        *(f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
        *(f"--object-store-memory={2**28}", "--include-dashboard=true", *options),
    ]
    with tempfile.TemporaryDirectory(
        prefix="pm-ray-"
    ) as folder:  # a short name: Ray limits the length of socket paths
        log = Path(folder) / "log"
        cwd = ROOT if serves else python.parent
        with open(log, "wb") as output:
            line.append(f"--temp-dir={folder}")
            process = subprocess.Popen(
                line, cwd=cwd, env=environment(python, **settings), stdout=output, stderr=output
            )
        server = Server(process, port, log)
        try:
            _wait_for(server)
            yield server
        finally:
            _end(server)


def command(
    python: Path, module: str, *arguments: str | Path, timeout_s: float = 240, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a module of Ray as a command in the project's root. settings: more environment variables."""
    line = [python, "-m", module, *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=environment(python, **settings), capture_output=True, text=True, timeout=timeout_s
    )


class Application:
    """The application of `serving/serve.yaml`, with another port and other arguments."""

    def __init__(self, python: Path, dashboard: Server, folder: Path) -> None:
        self._python, self._dashboard, self._file = python, dashboard, folder / "serve.yaml"
        self._config = yaml.safe_load((ROOT / "serving" / "serve.yaml").read_text(encoding="utf-8"))
        self._config["http_options"]["port"] = port = free_port()
        self._application["runtime_env"]["working_dir"] = _zipped(folder / "parallelmind.zip").as_uri()
        self.server = Server(dashboard.process, port, dashboard.log)
        self._replicas: dict[str, set[str]] = {}

    @property
    def _application(self) -> Any:
        return self._config["applications"][0]

    def deploy(self, **args: Any) -> None:
        """Deploy with these arguments, and wait until every replica has been replaced.

        Does nothing if the application has the arguments. An ingress replica runs at all times.
        """
        if args.items() <= self._application["args"].items():
            return
        before = self.running("Ingress") | self.running("EngineReplica")
        self._application["args"] |= args
        self._file.write_text(yaml.safe_dump(self._config), encoding="utf-8")
        completed = command(
            self._python, "ray.serve.scripts", "deploy", self._file, "--address", self._dashboard.url
        )
        assert completed.returncode == 0, completed.stderr
        wait_until(lambda: self._replaced(before))

    def _replaced(self, before: set[str]) -> bool:
        ingresses, engines = self.running("Ingress"), self.running("EngineReplica")
        assert ingresses or not before
        return self._status()["status"] == "RUNNING" and (ingresses | engines).isdisjoint(before)

    def running(self, deployment: str) -> set[str]:
        """Ids of its running replicas. While the application is built, the last known ones."""
        for name, status in self._status().get("deployments", {}).items():
            self._replicas[name] = {
                replica["replica_id"] for replica in status["replicas"] if replica["state"] == "RUNNING"
            }
        return self._replicas.get(deployment, set())

    def _status(self) -> Any:
        return self._dashboard.get("/api/serve/applications/")[1]["applications"].get("parallelmind", {})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _zipped(path: Path) -> Path:
    """Zip the parts of the project that `working_dir` needs."""
    with zipfile.ZipFile(path, "w") as file:
        for part in ("platform/parallelmind", "serving"):
            for source in (ROOT / part).rglob("*"):
                if "__pycache__" not in source.parts:
                    file.write(source, source.relative_to(ROOT))
    return path


def _wait_for(server: Server) -> None:
    deadline = time.monotonic() + _STARTUP_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{server.url}/api/authentication_mode", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no cluster after {_STARTUP_S} s:\n{server.log.read_text()}")


def _end(server: Server) -> None:
    """Kill the cluster: a raylet that receives SIGTERM waits half a minute for its actors."""
    killed = kill(server.process.pid)
    server.process.wait(timeout=30)
    assert psutil.wait_procs(killed, timeout=30)[1] == []

"""Clusters of several nodes on one machine, each started by `ray start` as on its own machine, and cut or
killed like one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import processes
import psutil
import pytest
from servers import ROOT

from serving.runtime.ports import free_port

_WAIT_S = 120
NEEDED = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and iproute2"
)
# Nodes see each other, so they listen on all that their namespaces have.
_OURS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
# Serve's settings that `ray start` needs in its environment.
_SETTLED = "import os, sys, serving.runtime.ray_env; os.execv(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True)
class Place:
    """Where a node lives: the network namespace that it is in, and its address there."""

    ip: str
    namespace: str

    def command(self, *line: str | Path) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *map(str, line)]

    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return {**kept, **_OURS, "PYTHONPATH": paths}


@dataclass
class Node:
    """A node that runs."""

    process: subprocess.Popen[bytes]

    def family(self, name: str = "") -> list[psutil.Process]:
        """Its processes whose command names this."""
        return processes.family(self.process.pid, name)

    def kill(self) -> None:
        """All of it at once, as by a power cut."""
        killed = processes.kill(self.process.pid)
        self.process.wait(timeout=30)
        psutil.wait_procs(killed, timeout=30)

    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass
class Nodes:
    """One cluster. place: where its head is. dashboard: its port there."""

    folder: Path
    place: Place
    serves: bool
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.place.ip}:{self.port}"

    def head(self, cpus: int) -> Node:
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1"]
        own = [
            "--include-dashboard=true",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.folder}",
        ]
        return self._start(self.place, cpus, "--head", *ports, *own)

    def add(self, cpus: int, place: Place) -> Node:
        return self._start(place, cpus, f"--address={self.address}")

    def _start(self, place: Place, cpus: int, *options: str) -> Node:
        line: list[str | Path] = [
            *((sys.executable, "-c", _SETTLED) if self.serves else ()),
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--block",
                f"--num-cpus={cpus}",
                "--disable-usage-stats",
            ),
            *(f"--node-ip-address={place.ip}", f"--dashboard-agent-listen-port={free_port()}"),
            *(f"--object-store-memory={2**27}", *options),
        ]
        log = self.folder / f"node-{len(self.nodes)}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                place.command(*line), cwd=ROOT, env=place.environment(), stdout=output, stderr=output
            )
        node = Node(process)
        self.nodes.append(node)
        deadline = (
            time.monotonic() + _WAIT_S
        )  # one after another: they share a disk, and would take each other's names
        while "Ray runtime started" not in log.read_text():
            assert node.alive(), log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        return node

    def wait_for(self, count: int) -> None:
        """Until so many nodes are up."""
        ask = f"import ray; ray.init({self.address!r}, log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            line = self.place.command(sys.executable, "-c", ask)
            asked = subprocess.run(
                line, cwd=ROOT, env=self.place.environment(), capture_output=True, text=True, check=False
            )
            if asked.stdout.strip() == str(count):
                return
            time.sleep(0.5)
        raise TimeoutError(f"not {count} nodes: {asked.stdout} {asked.stderr[-2000:]}")


@contextmanager
def cluster(cpus: int, place: Place, serves: bool = False) -> Iterator[Nodes]:
    """A cluster of a head until the end of the block. serves: with the settings of
    serving/runtime/ray_env.py.
    """
    with tempfile.TemporaryDirectory(prefix="pm-") as folder:  # short: socket paths may have 107 characters
        nodes = Nodes(Path(folder), place, serves)
        try:
            nodes.head(cpus)
            nodes.wait_for(1)
            yield nodes
        finally:
            for node in nodes.nodes:
                node.kill()


@contextmanager
def network(*names: str) -> Iterator[list[Place]]:
    """Places with addresses of their own that see each other, and are seen from here. Needs root."""
    hub, tag = f"pm{os.getpid()}", f"pm{os.getpid() % 10000}"
    places = [Place(f"10.77.0.{number}", f"{hub}-{name}") for number, name in enumerate(names, start=1)]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        _ip("link", "add", tag, "type", "veth", "peer", "name", "here", "netns", hub)
        _ip("-n", hub, "link", "set", "here", "master", "bridge", "up")
        _ip("addr", "add", "10.77.0.254/24", "dev", tag)
        _ip("link", "set", tag, "up")
        for number, place in enumerate(places, start=1):
            space, outer = place.namespace, f"{tag}o{number}"
            _ip("netns", "add", space)
            _ip("-n", hub, "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", hub, "link", "set", outer, "master", "bridge", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{place.ip}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
        yield places
    finally:
        # By itself it would go only with the last process in those namespaces, and be in the way of the next
        # network.
        subprocess.run(["ip", "link", "delete", tag], check=False, capture_output=True)
        for space in [hub, *(place.namespace for place in places)]:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


@contextmanager
def cut(place: Place) -> Iterator[None]:
    """Nothing comes to this place or leaves it until the end of the block."""
    _ip("-n", place.namespace, "link", "set", "eth0", "down")
    try:
        yield
    finally:
        _ip("-n", place.namespace, "link", "set", "eth0", "up")


def _ip(*line: str) -> None:
    subprocess.run(["ip", *line], check=True, capture_output=True)

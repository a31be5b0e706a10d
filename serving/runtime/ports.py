"""Ports: those that nobody has, and the one that Serve opens in every replica, and to whom."""

from __future__ import annotations

import socket
import sys
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def keep_on_node_address() -> None:
    """Call this in a deployment's constructor, which runs before Serve opens the replica's own gRPC port.

    Serve binds that port to all interfaces and unpickles whatever is sent there, without authentication:
    anyone who reaches it can run code. With this it listens where the node's raylet does, which is 127.0.0.1
    for `python -m serving`.
    """
    replica: Any = sys.modules.get("ray.serve._private.replica")
    if replica is None:  # used without Serve
        return
    from ray.util import get_node_ip_address

    add_port = replica.add_port_to_grpc_server
    address = get_node_ip_address()
    host = f"[{address}]" if ":" in address else address
    replica.add_port_to_grpc_server = lambda server, where: add_port(server, where.replace("[::]", host))

"""Host names under which the server is reached.

A web page whose own name is made to point at this machine (DNS rebinding) reaches the server under that name.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit


class AllowedHosts:
    """Loopback names, addresses, this machine's name, and the given names.

    An address needs no entry: no page has one for a name of its own.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """names: of hosts; `*.example.com` is every name below example.com, `*` every name."""
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}

    def __contains__(self, header: str) -> bool:
        """Whether the server is reached under this Host header, a name or address with or without a port."""
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        if not name:
            return False
        parents = name.split(".")[1:]
        patterns = [".".join(["*", *parents[index:]]) for index in range(len(parents))]
        return is_address(name) or not self._names.isdisjoint([name, "*", *patterns])


def is_address(name: str) -> bool:
    """Whether a host is an IP address and not a name."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on this host."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)

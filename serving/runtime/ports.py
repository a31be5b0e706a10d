"""Find free TCP ports."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_port_range(size: int) -> tuple[int, int]:
    """First and last of `size` adjacent ports of which nothing listens on any at this moment.

    They lie below the range from which Linux takes ports for outgoing connections. Raises OSError if no range
    is free.
    """
    starts = list(range(20_000, 32_000 - size, size))
    random.shuffle(starts)
    for start in starts:
        if all(_is_free(port) for port in range(start, start + size)):
            return start, start + size - 1
    raise OSError(f"no {size} adjacent free ports between 20000 and 32000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True

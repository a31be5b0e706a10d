"""Find free TCP ports.

All lie below the range from which Linux takes ports for outgoing connections and for servers that ask for any
port. Otherwise such a port could be taken between the time when it is chosen and the time when it is bound.
"""

from __future__ import annotations

import random
import socket

_RANGES, _SINGLES = range(20_000, 28_000), range(28_000, 32_768)
_held: list[socket.socket] = []
_chosen: set[int] = set()


def free_port() -> int:
    """A port that nothing listens on at this moment, another one at every call.

    Raises OSError if there is none.
    """
    candidates = [port for port in _SINGLES if port not in _chosen]
    random.shuffle(candidates)
    port = next((port for port in candidates if _is_free(port)), None)
    if port is None:
        raise OSError(f"no free port between {_SINGLES.start} and {_SINGLES.stop - 1}")
    _chosen.add(port)
    return port


def reserve_ports(size: int) -> range:
    """Adjacent ports that nothing listens on at this moment and that no other process reserves.

    The port below them is bound as long as this process lives: no other process, which finds it taken,
    reserves the same ports before they are bound. Raises OSError if no range is free.
    """
    starts = list(range(_RANGES.start, _RANGES.stop - size, size + 1))
    random.shuffle(starts)
    for start in starts:
        ports = range(start + 1, start + 1 + size)
        if all(map(_is_free, ports)) and (held := _bind(start)):
            _held.append(held)
            return ports
    raise OSError(f"no {size + 1} adjacent free ports between {_RANGES.start} and {_RANGES.stop - 1}")


def _is_free(port: int) -> bool:
    bound = _bind(port)
    if bound is not None:
        bound.close()
    return bound is not None


def _bind(port: int) -> socket.socket | None:
    """A socket at the port of all interfaces; None if the port is taken."""
    bound = socket.socket()
    try:
        bound.bind(("", port))
    except OSError:
        bound.close()
        return None
    return bound

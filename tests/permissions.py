"""File permissions that hold for the superuser, too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3, _MAY_OVERRIDE = 0x20080522, (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Within the context this thread may open only what the mode of a file or folder allows."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, saved = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, saved) == 0
    reduced = (ctypes.c_uint32 * 6)(*saved)
    reduced[0] &= ~_MAY_OVERRIDE  # the effective set
    assert libc.capset(header, reduced) == 0
    try:
        yield
    finally:
        assert libc.capset(header, saved) == 0

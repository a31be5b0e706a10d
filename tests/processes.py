"""Processes that a test has started, and theirs."""

from __future__ import annotations

from contextlib import suppress

import psutil


def family(pid: int, name: str = "") -> list[psutil.Process]:
    """The children of a process, children of children too, whose command names this."""
    return [each for each in psutil.Process(pid).children(recursive=True) if name in _command(each)]


def kill(pid: int) -> list[psutil.Process]:
    """SIGKILL to a process and its family, as by a power cut; returns them. It may have ended before."""
    killed: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        killed = [psutil.Process(pid), *family(pid)]
    for each in killed:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    return killed


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has gone meanwhile
        return ""

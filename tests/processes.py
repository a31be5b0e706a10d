"""Processes that a test has started, and their descendants."""

from __future__ import annotations

from contextlib import suppress

import psutil


def family(pid: int, name: str = "") -> list[psutil.Process]:
    """The descendants of a process whose command line contains the name."""
    return [child for child in psutil.Process(pid).children(recursive=True) if name in _command(child)]


def kill(pid: int) -> list[psutil.Process]:
    """Kill a process and its descendants, like a power cut; return them. The process may have ended."""
    killed: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        killed = [psutil.Process(pid), *family(pid)]
    for process in killed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return killed


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # the process has ended
        return ""

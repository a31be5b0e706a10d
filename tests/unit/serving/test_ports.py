"""A port that is chosen stays free until a server binds it, although other programs take ports."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving.runtime import ports
from serving.runtime.ports import free_port, reserve_ports

# Linux takes ports from this one on for outgoing connections and for servers that ask for any port.
FIRST_EPHEMERAL = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def test_no_connection_takes_a_port_that_was_chosen() -> None:
    assert free_port() < FIRST_EPHEMERAL
    assert max(reserve_ports(50)) < FIRST_EPHEMERAL


def test_a_chosen_port_is_free_and_not_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start = free_port()
    monkeypatch.setattr(ports, "_SINGLES", range(start, start + 4))
    monkeypatch.setattr(ports, "_chosen", set())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", start))
        listener.listen()
        assert sorted(free_port() for _ in range(3)) == [start + 1, start + 2, start + 3]
        with pytest.raises(OSError, match="no free port"):
            free_port()


def test_reserved_ports_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    first = reserve_ports(9).start
    monkeypatch.setattr(ports, "_RANGES", range(first + 9, first + 30))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as an ingress replica does
        listener.bind(("127.0.0.1", first + 15))
        listener.listen()
        assert reserve_ports(9).start == first + 20


def test_two_processes_do_not_reserve_the_same_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has bound one of its ports yet."""
    program = "from serving.runtime.ports import reserve_ports as own; print(own(9)[0], flush=True); input()"
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin
        assert other.stdout
        taken = int(other.stdout.readline())
        monkeypatch.setattr(ports, "_RANGES", range(taken - 1, taken + 30))
        chosen = {reserve_ports(9).start, reserve_ports(9).start}
        other.stdin.write("\n")
    assert chosen == {taken + 10, taken + 20}

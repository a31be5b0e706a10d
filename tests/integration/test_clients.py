"""Unmodified clients of OpenAI's API pass their checks against a real server."""

from __future__ import annotations

import pytest
from servers import Server

from benchmarks.clients import catalog
from benchmarks.clients.catalog import CLIENTS
from benchmarks.clients.install import install, is_installed

pytestmark = pytest.mark.slow
IN_PROJECT = ["openai", "openai async"]


def run(name: str, server: Server, folder: str) -> None:
    done = CLIENTS[name].run(catalog.Server(f"{server.url}/v1", "talker", folder))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", IN_PROJECT)
def test_openais_own_package(name: str, shared_server: Server, talker: str) -> None:
    run(name, shared_server, talker)


@pytest.fixture(scope="module")
def installed() -> None:
    if not is_installed():
        install()


@pytest.mark.full
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [name for name in CLIENTS if name not in IN_PROJECT])
def test_a_client_that_is_installed_apart(name: str, shared_server: Server, talker: str) -> None:
    if reason := CLIENTS[name].reason:
        pytest.skip(reason)  # there is no node
    run(name, shared_server, talker)


def test_a_failed_check_fails_the_client(shared_server: Server, talker: str) -> None:
    done = CLIENTS["openai"].run(catalog.Server(f"{shared_server.url}/v1", "another", talker))
    assert done.returncode
    assert "AssertionError" in done.stdout

"""One server for all tests of a session that need nothing but a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, save_talker, serving


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_talker(tmp_path_factory.mktemp("shared_server") / "talker")


@pytest.fixture(scope="session")
def shared_server(talker: str) -> Iterator[Server]:
    """A server of the model `talker`. Tests share it one after another and leave no request open."""
    folder = Path(talker).parent
    with serving(
        folder / "server",
        base_model=talker,
        adapter_root=str(folder),
        max_requests=16,
        max_body_bytes=65536,
        max_prompt_tokens=1024,
        max_new_tokens=512,
        slow_client_s=2,
    ) as server:
        yield server

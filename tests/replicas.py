"""An engine replica in this process, and the stream that a caller of it reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from engines import saved_adapters

from serving.config import AppConfig
from serving.engine.messages import EngineRequest
from serving.engine.replica import EngineReplica


def make_replica(folder: Path, **settings: int) -> EngineReplica:
    saved_adapters(folder)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    fields = {"base_model": str(folder / "base"), "cache_tokens": 4096, "num_threads": 1, **settings}
    # These two change the process.
    process_changes = patch.multiple(
        "serving.engine.replica",
        bind_replica_port_to_node_address=lambda: None,
        configure_log=lambda _: None,
    )
    with process_changes, patch("serving.engine.replica.serve.get_replica_context", lambda: context):
        return EngineReplica(AppConfig.of(fields))


class ReplicaStream:
    """Stands for the response of a streaming call."""

    def __init__(self, replica: EngineReplica, request: EngineRequest) -> None:
        self._messages: Any = replica.generate(request)

    def __aiter__(self) -> AsyncIterator[Any]:
        messages: AsyncIterator[Any] = self._messages
        return messages

    def cancel(self) -> None:
        """Called when the reader closes the stream."""
        self._closing = asyncio.ensure_future(self._messages.aclose())

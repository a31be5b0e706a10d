"""One connection for the steps of all requests of an ingress process, with one message for each engine step.

Serve sends a message for every request and step, which takes a tenth of a millisecond on either side.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hmac import compare_digest
from itertools import count

from serving.engine.messages import PackedStep, StepsAt, StreamKey

LENGTH_BYTES = 4
READER_BYTES = 16  # of the id of an ingress process
KEY_BYTES = 32
BY_SERVE = "serve"  # in place of a step that Serve brings: one with segments, which JSON does not hold
_HEARTBEAT_S = 1.0
_UNREAD_S = 30.0  # for the ingress to connect after a stream has ended
_to_json = json.JSONEncoder(separators=(",", ":")).encode

# The number of a stream, the index of a step there, and the step; None at the end of the stream.
Entry = tuple[int, int, PackedStep | str | None]


def frame(entries: Sequence[Entry]) -> bytes:
    """A message: its length, and the entries in JSON."""
    content = _to_json(entries).encode()
    return len(content).to_bytes(LENGTH_BYTES) + content


@dataclass(eq=False, slots=True)
class _Link:
    """What is sent to one ingress process. entries: not sent yet. num_streams: that have not ended."""

    writer: asyncio.StreamWriter | None = None
    entries: list[Entry] = field(default_factory=list)
    num_streams: int = 0

    def put(self, entry: Entry) -> None:
        """Send with everything else that the event loop puts in this turn."""
        if not self.entries:
            asyncio.get_running_loop().call_soon(self.flush)
        self.entries.append(entry)

    def flush(self) -> None:
        if self.entries and self.writer is not None:
            self.writer.write(frame(self.entries))
            self.entries.clear()


class StepSender:
    """Listens for ingress processes. Both sides show a key, which they have from Serve.

    The ingress connects when a stream of its own tells it to. Steps wait until then.
    """

    def __init__(self, host: str) -> None:
        """host: address of this machine that ingress processes reach."""
        self._host = host
        self._reader_key, self._sender_key = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        self._links: dict[bytes, _Link] = {}
        self._server: asyncio.Task[asyncio.Server] | None = None

    async def address(self) -> StepsAt:
        """Where an ingress process connects to."""
        if self._server is None:
            self._server = asyncio.create_task(asyncio.start_server(self._serve, self._host, 0))
        server = await asyncio.shield(self._server)
        port = server.sockets[0].getsockname()[1]
        return StepsAt(self._host, port, self._reader_key, self._sender_key)

    @contextmanager
    def stream(self, key: StreamKey) -> Iterator[Callable[[PackedStep | str], None]]:
        """A function that sends the next step of a stream, or BY_SERVE.

        The end of the stream follows, unless the block raises: Serve reports that.
        """
        link, indices = self._links.setdefault(key.reader, _Link()), count()
        link.num_streams += 1
        try:
            yield lambda step: link.put((key.number, next(indices), step))
            link.put((key.number, next(indices), None))
        finally:
            link.num_streams -= 1
            asyncio.get_running_loop().call_later(_UNREAD_S, self._remove_unused, key.reader, link)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send to one ingress process until it disconnects."""
        try:
            shown = await reader.readexactly(KEY_BYTES + READER_BYTES)
        except (asyncio.IncompleteReadError, ConnectionError):
            shown = b""
        if not compare_digest(shown[:KEY_BYTES], self._reader_key):
            writer.close()
            return
        name = shown[KEY_BYTES:]
        link = self._links.setdefault(name, _Link())
        link.writer = writer
        writer.write(self._sender_key)
        link.flush()
        while not writer.is_closing():
            writer.write(frame([]))
            await asyncio.sleep(_HEARTBEAT_S)
        if link.writer is writer:  # the process has not connected anew
            link.writer = None
            self._remove_unused(name, link)

    def _remove_unused(self, name: bytes, link: _Link) -> None:
        if link.writer is None and not link.num_streams and self._links.get(name) is link:
            del self._links[name]

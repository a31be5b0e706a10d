"""The connections of an ingress process to the engines: each brings the steps of all requests there."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from hmac import compare_digest
from itertools import count

from serving.engine.messages import PackedStep, StepsAt, StreamKey, step_of_json
from serving.engine.step_sender import BY_SERVE, KEY_BYTES, LENGTH_BYTES, READER_BYTES

# An engine sends something every second. Serve takes longer to notice a frozen one.
SILENCE_TIMEOUT_S = 6.0
_CONNECT_TIMEOUT_S = 3.0
_SERVE_REPORTS_S = 1.0  # for Serve to report the loss of an engine, and to send nothing more to it


class SilentEngineError(RuntimeError):
    """An engine has not sent anything for too long."""


class ConnectionLostError(RuntimeError):
    """The connection to an engine has ended, and Serve knows of no reason."""


Received = PackedStep | str | None | Exception


class StepStream:
    """The steps of one request from one engine. key: names it to the engine."""

    def __init__(self, key: StreamKey) -> None:
        self.key = key
        self.address: StepsAt | None = None
        self._num_received = 0
        self._queue, self._by_serve = asyncio.Queue[Received](), asyncio.Queue[PackedStep | Exception]()

    def put(self, received: Received) -> None:
        """Add a step, BY_SERVE in its place, the end of the stream (None), or what it fails with."""
        self._queue.put_nowait(received)

    def put_at(self, index: int, received: PackedStep | str | None) -> None:
        """Add what the engine has sent as number `index`. Without the one before, the stream fails."""
        if index == self._num_received:
            self.put(received)
        else:
            self.put(ConnectionLostError("steps were lost with a connection to the engine"))
        self._num_received += 1

    def put_by_serve(self, received: PackedStep | Exception) -> None:
        """Add a step that Serve has brought, or what Serve's stream fails with."""
        self._by_serve.put_nowait(received)
        if isinstance(received, Exception):
            self.put(received)

    async def steps(self) -> AsyncGenerator[PackedStep, None]:
        """All steps. Raises what the stream fails with."""
        while (received := await self._queue.get()) is not None:
            if isinstance(received, str):
                received = await self._by_serve.get()
            if isinstance(received, Exception):
                raise received
            yield received


class StepReceiver:
    """All connections of this process, each opened by the first request that needs it."""

    def __init__(self) -> None:
        self._name, self._numbers = secrets.token_bytes(READER_BYTES), count()
        self._streams: dict[int, StepStream] = {}
        self._connections: dict[StepsAt, asyncio.Task[None]] = {}

    @contextmanager
    def stream(self) -> Iterator[StepStream]:
        """A new stream. What arrives for it after the block is dropped."""
        number = next(self._numbers)
        self._streams[number] = stream = StepStream(StreamKey(self._name, number))
        try:
            yield stream
        finally:
            del self._streams[number]

    def connect(self, stream: StepStream, address: StepsAt) -> None:
        """Receive the steps of a stream from an engine. A failure of the connection is one of the stream."""
        stream.address = address
        if address not in self._connections:
            self._connections[address] = asyncio.create_task(self._receive(address))

    async def _receive(self, address: StepsAt) -> None:
        failure: Exception = ConnectionLostError("the connection to the engine has ended")
        try:
            await self._receive_all(address)
        except TimeoutError:
            failure = SilentEngineError(f"nothing has come from the engine for {SILENCE_TIMEOUT_S:g} s")
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            del self._connections[address]
            streams = [stream for stream in self._streams.values() if stream.address == address]
            for stream in streams:
                asyncio.get_running_loop().call_later(_SERVE_REPORTS_S, stream.put, failure)

    async def _receive_all(self, address: StepsAt) -> None:
        """Give every stream its steps. Raises TimeoutError, OSError or IncompleteReadError."""
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            writer.write(address.reader_key + self._name)
            async with asyncio.timeout(SILENCE_TIMEOUT_S):
                shown = await reader.readexactly(KEY_BYTES)
            if not compare_digest(shown, address.sender_key):
                raise ConnectionError("another process listens at the engine's port")
            while True:
                async with asyncio.timeout(SILENCE_TIMEOUT_S):
                    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
                    content = await reader.readexactly(length)
                for number, index, step in json.loads(content):
                    if number in self._streams:  # the reader has not left
                        is_step = step is not None and step != BY_SERVE
                        self._streams[number].put_at(index, step_of_json(step) if is_step else step)
        finally:
            writer.close()

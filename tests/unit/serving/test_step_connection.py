"""The steps of all streams of an ingress process reach it over one connection to each engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from math import inf
from typing import Any

import pytest
from engine_loops import running_loop, sample_request
from engines import ISOLATED, tiny_engine
from ray.exceptions import ActorDiedError

from parallelmind.engine.output import Event, TokenLogprob
from serving.engine import step_sender
from serving.engine.loop import EngineStuckError
from serving.engine.messages import (
    BranchStarted,
    EngineRequest,
    PackedStep,
    StepOutput,
    StepsAt,
    StreamKey,
    pack_step,
)
from serving.engine.step_sender import BY_SERVE, KEY_BYTES, READER_BYTES, StepSender
from serving.ingress import failover, step_receiver
from serving.ingress.failover import stream_with_failover
from serving.ingress.step_receiver import ConnectionLostError, SilentEngineError, StepReceiver
from serving.observability.metrics import IngressMetrics

PROMPT = (TokenLogprob(7), TokenLogprob(8, -0.1, ((9, -2.5),)))
STEPS = [
    pack_step(StepOutput([], (BranchStarted(0, (0, 3)),), adapter_version="1")),
    pack_step(
        StepOutput([Event(0, "\ud800é", 5, None, -1 / 3, ((5, -1 / 3), (6, -inf)), 2, (0, 3), prompt=PROMPT)])
    ),
    *(pack_step(StepOutput([Event(0, "", token)])) for token in range(3)),
]


def test_a_step_that_serve_brings_keeps_its_place() -> None:
    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        with receiver.stream() as stream:
            with sender.stream(stream.key) as send:
                receiver.connect(stream, await sender.address())
                for step in (STEPS[0], BY_SERVE, STEPS[2]):
                    send(step)
            reading = asyncio.ensure_future(read(stream.steps()))
            await asyncio.sleep(0.1)
            assert not reading.done()
            stream.put_by_serve(STEPS[1])
            assert await reading == STEPS[:3]

    run(test)


def run(test: Callable[[StepSender, StepReceiver], Awaitable[None]]) -> None:
    async def run_test() -> None:
        sender = StepSender("127.0.0.1")
        await asyncio.wait_for(test(sender, StepReceiver()), 30)
        if sender._server is not None:
            (await sender._server).close()

    asyncio.run(run_test())


async def read(steps: AsyncIterator[PackedStep]) -> list[PackedStep]:
    return [step async for step in steps]


def test_every_stream_gets_its_own_steps_in_order_and_its_end() -> None:
    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        with receiver.stream() as one, receiver.stream() as other:
            address = await sender.address()
            with sender.stream(one.key) as send_one:  # before the ingress connects
                send_one(STEPS[0])
                receiver.connect(one, address)
                with sender.stream(other.key) as send_other:
                    receiver.connect(other, address)
                    for step in STEPS[1:]:
                        send_one(step)
                        send_other(step)
                        await asyncio.sleep(0.01)
            assert await read(one.steps()) == STEPS
            assert await read(other.steps()) == STEPS[1:]
            assert len(receiver._connections) == len(sender._links) == 1

    run(test)


def test_who_does_not_know_the_key_gets_nothing() -> None:
    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        with receiver.stream() as stream, sender.stream(stream.key) as send:
            send(STEPS[0])
            address = await sender.address()
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(bytes(KEY_BYTES) + stream.key.reader)
            assert await reader.read() == b""
            writer.close()

    run(test)


def test_nothing_is_read_from_another_process_at_the_port_of_an_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_receiver, "_SERVE_REPORTS_S", 0)
    monkeypatch.setattr(step_receiver.json, "loads", lambda _: pytest.fail("read"))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(KEY_BYTES + READER_BYTES)
        writer.write(bytes(KEY_BYTES) + (4).to_bytes(4) + b"evil")
        await reader.read()
        writer.close()

    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with receiver.stream() as stream:
            receiver.connect(stream, (await sender.address())._replace(port=port))
            with pytest.raises(ConnectionLostError):
                await read(stream.steps())
        server.close()

    run(test)


def test_a_stream_fails_when_its_engine_is_silent_or_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_receiver, "_SERVE_REPORTS_S", 0)

    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        with receiver.stream() as stream, sender.stream(stream.key) as send:
            receiver.connect(stream, await sender.address())
            send(STEPS[0])
            steps = stream.steps()
            assert await anext(steps) == STEPS[0]
            (link,) = sender._links.values()
            assert link.writer is not None
            link.writer.close()
            with pytest.raises(ConnectionLostError):
                await anext(steps)
        monkeypatch.setattr(step_receiver, "SILENCE_TIMEOUT_S", 0.1)  # shorter than the engine's heartbeat
        with receiver.stream() as stream, sender.stream(stream.key):
            receiver.connect(stream, await sender.address())
            with pytest.raises(SilentEngineError):
                await read(stream.steps())

    run(test)


class ConnectedEngines:
    """Stands for Serve's handle: engines that send their steps over connections. The first one dies."""

    def __init__(self, sender: StepSender) -> None:
        self._sender, self.requests = sender, list[EngineRequest]()

    @property
    def generate(self) -> Any:
        return self

    def remote(self, request: EngineRequest, key: StreamKey) -> Any:
        self.requests.append(request)
        return ServeStream(self._messages(request, key, len(self.requests) == 1))

    async def _messages(self, request: EngineRequest, key: StreamKey, dies: bool) -> AsyncIterator[StepsAt]:
        yield await self._sender.address()
        with running_loop(tiny_engine(ISOLATED)) as loop, self._sender.stream(key) as send:
            running = await loop.submit(request, None)
            step: StepOutput | None = StepOutput([], running.started, adapter_version="1")
            num_steps = 0
            while step is not None:
                send(pack_step(step))
                num_steps += bool(step.events)
                if dies and num_steps == 3:
                    await asyncio.sleep(0.05)
                    raise ActorDiedError
                step = await loop.next_output(running)


class ServeStream:
    """Stands for the response of a streaming call."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        """Called when the reader closes the stream."""


def test_a_sample_is_finished_by_another_engine_over_its_connection() -> None:
    async def tokens(engines: ConnectedEngines, receiver: StepReceiver) -> list[tuple[int, int | None]]:
        steps = stream_with_failover(engines, sample_request(), IngressMetrics(), receiver)  # type: ignore[arg-type]
        return sorted(
            [(event.branch, event.pos2d[1]) async for step in steps for event in step.events if event.pos2d]
        )

    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        engines = ConnectedEngines(sender)
        interrupted = await tokens(engines, receiver)
        assert len(engines.requests) == 2
        assert engines.requests[1].resume is not None
        assert interrupted == await tokens(engines, receiver)
        assert len(engines.requests) == 3

    run(test)


def test_steps_that_were_lost_with_a_connection_fail_the_stream() -> None:
    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        with receiver.stream() as stream, receiver.stream() as other:
            address = await sender.address()
            with sender.stream(other.key), sender.stream(stream.key) as send:
                receiver.connect(other, address)
                await asyncio.sleep(0.05)
                (link,) = sender._links.values()
                assert link.writer is not None
                link.writer.close()
                send(STEPS[0])  # before the ingress knows the address of the stream
                await asyncio.sleep(0.05)
                receiver.connect(stream, address)
                await asyncio.sleep(0.05)
                send(STEPS[1])
                with pytest.raises(ConnectionLostError):
                    await anext(stream.steps())

    run(test)


def test_the_end_of_a_stream_that_fails_is_left_to_serve() -> None:
    async def test(sender: StepSender, receiver: StepReceiver) -> None:
        with receiver.stream() as stream:
            receiver.connect(stream, await sender.address())
            with suppress(EngineStuckError), sender.stream(stream.key) as send:
                send(STEPS[0])
                raise EngineStuckError
            await asyncio.sleep(0.05)
            stream.put_by_serve(EngineStuckError())
            steps = stream.steps()
            assert await anext(steps) == STEPS[0]
            with pytest.raises(EngineStuckError):
                await anext(steps)

    run(test)


def test_a_stream_whose_end_does_not_come_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "SILENCE_TIMEOUT_S", 0.05)

    async def test(_: StepSender, receiver: StepReceiver) -> None:
        with receiver.stream() as stream:
            watch = asyncio.create_task(failover._watch(ServeStream(messages()), stream))
            with pytest.raises(ConnectionLostError):
                await read(stream.steps())
            await watch

    async def messages() -> AsyncIterator[PackedStep]:
        for _ in ():
            yield STEPS[0]

    run(test)


def test_a_process_that_has_gone_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sender, "_UNREAD_S", 0.01)

    async def test(sender: StepSender, _: StepReceiver) -> None:
        with sender.stream(StreamKey(bytes(READER_BYTES), 0)) as send:
            send(STEPS[0])
        await asyncio.sleep(0.1)
        assert not sender._links

    run(test)

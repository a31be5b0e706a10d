"""A client that loses its connection, or its ingress, reads the rest of its stream from another one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asgi import Reply, make_ingress, post_json
from engine_loops import sample_request
from replicas import ReplicaStream, make_replica
from starlette.types import ASGIApp

from parallelmind.engine.output import Event
from serving.engine import kept_streams
from serving.engine.kept_streams import KeptStreams
from serving.engine.messages import EngineRequest, PackedStep, StepOutput, StreamHistory, pack_step
from serving.engine.replica import EngineReplica
from serving.ingress import engine_client

SETTINGS = {"model": "base", "temperature": 1, "seed": 3, "stream": True}
SAMPLING = {**SETTINGS, "max_tokens": 12, "ignore_eos": True}
CONVERSATION = [{"role": "user", "content": "who"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {**SAMPLING, "prompt": ["who", "where is"], "n": 2, "logprobs": 2},
    "/v1/chat/completions": {**SAMPLING, "messages": CONVERSATION, "stream_options": {"include_usage": True}},
    "/v1/branches": {**SAMPLING, "main": "who", "branches": [" a", " b"], "reduce": " so"},
}
COMPLETION = BODIES["/v1/completions"]


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineReplica]:
    """The only engine of every front."""
    replica = make_replica(tmp_path / "replica")

    async def broadcast(_: Any, method: str, *args: Any) -> list[Awaitable[Any]]:
        return [getattr(replica, method)(*args)]

    monkeypatch.setattr(engine_client, "broadcast", broadcast)
    yield replica
    replica._loop.stop()


@pytest.fixture
def fronts(replica: EngineReplica, tmp_path: Path) -> list[ASGIApp]:
    """Two applications as they run in two ingress processes."""
    return [
        make_ingress(
            tmp_path / name, open_stream=lambda request: ReplicaStream(replica, request)
        ).__serve_build_asgi_app__()
        for name in ("one", "two")
    ]


async def read(app: ASGIApp, route: str, num_events: int | None = None, last_id: str = "") -> list[str]:
    """The events of a stream; only so many if the connection is lost after them."""
    reply, is_lost = Reply(), asyncio.Event()

    async def lossy(scope: Any, receive: Any, send: Any) -> None:
        async def send_some(message: Any) -> None:
            if len(events_in(reply)) == num_events:
                is_lost.set()
                await asyncio.Future()
            reply.status = message.get("status", reply.status)
            reply.body += message.get("body", b"")

        await app(scope, receive, send_some)

    headers = {"last-event-id": last_id} if last_id else {}
    client = asyncio.ensure_future(post_json(lossy, route, BODIES[route], **headers))
    loss = asyncio.ensure_future(is_lost.wait())
    await asyncio.wait([client, loss], return_when=asyncio.FIRST_COMPLETED)
    for task in (client, loss):
        task.cancel()
    await asyncio.wait([client, loss])
    assert reply.status == 200, reply.body
    return events_in(reply)


def events_in(reply: Reply) -> list[str]:
    return [event for event in reply.body.decode().split("\n\n") if event and not event.startswith(":")]


def id_of(event: str) -> str:
    return event.partition("\n")[0].removeprefix("id: ")


def chunks_of(events: Sequence[str]) -> list[Any]:
    """What the events tell, without ids and times, which differ from request to request."""
    data = [event.rpartition("data: ")[2] for event in events]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(text) for text in data[:-1]]
    return [{key: chunk[key] for key in chunk if key not in ("id", "created")} for chunk in chunks]


def tokens_in(chunks: Sequence[Any]) -> dict[int, list[Any]]:
    """What the chunks tell of every branch, token by token."""
    branches: dict[int, list[Any]] = {}
    for chunk in chunks:
        for part in [*chunk.get("choices", []), *chunk.get("deltas", [])]:
            branches.setdefault(part["index"], []).append(part)
    return branches


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("losses", [[1], [5], [3, 1]], ids=str)
def test_no_token_is_lost_or_doubled(
    replica: EngineReplica, fronts: list[ASGIApp], route: str, losses: list[int]
) -> None:
    async def run() -> None:
        expected = chunks_of(await read(fronts[0], route))
        events = list[str]()
        for turn, num_events in enumerate([*losses, None]):
            last_id = id_of(events[-1]) if events else ""
            events += await read(fronts[turn % 2], route, num_events, last_id)
        chunks = chunks_of(events)
        assert tokens_in(chunks) == tokens_in(expected)
        assert chunks[-1].get("usage") == expected[-1].get("usage")
        stream = id_of(events[0]).partition(":")[0]
        assert list(map(id_of, events[:-1])) == [f"{stream}:{number}" for number in range(1, len(events))]
        while replica._engine.busy:  # nothing is decoded for lost connections
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_stream_that_has_ended_can_be_read_again(fronts: list[ASGIApp]) -> None:
    async def run() -> None:
        events = await read(fronts[0], "/v1/branches")
        rest = await read(fronts[1], "/v1/branches", last_id=id_of(events[2]))
        assert rest == events[3:]
        assert await read(fronts[1], "/v1/branches", last_id=id_of(events[-2])) == events[-1:]

    asyncio.run(run())


def test_a_branch_that_was_added_is_in_the_rest(fronts: list[ASGIApp]) -> None:
    async def run() -> None:
        events = await read(fronts[0], "/v1/branches", num_events=1)
        sample = json.loads(events[0].partition("data: ")[2])["id"]
        resumed = asyncio.ensure_future(
            read(fronts[1], "/v1/branches", num_events=3, last_id=id_of(events[-1]))
        )
        reply = Reply()
        while reply.status != 201:  # through the other front, as soon as the sample runs again
            body = {"text": " when", "max_tokens": 2}
            reply = await post_json(
                fronts[0], f"/v1/branches/{sample}/branches", body, **{"idempotency-key": "mine"}
            )
        events += await resumed
        events += await read(fronts[0], "/v1/branches", last_id=id_of(events[-1]))
        chunks = chunks_of(events)
        starts = [start["path"] for chunk in chunks for start in chunk.get("branches", [])]
        assert sorted(starts) == ["branches[0]", "branches[1]", "branches[2]", "reduce"]
        assert json.loads(reply.body)["path"] == "branches[2]"
        added = tokens_in(chunks)[json.loads(reply.body)["index"]]
        assert [part["path"] for part in added] == ["branches[2]"] * len(added)
        assert added[-1]["finish_reason"] is not None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("last_id", "status"),
    [(f"cmpl-{'0' * 32}:3", 404), ("cmpl-1", 400), (f"cmpl-{'0' * 32}", 400), ("", 400)],
)
def test_a_stream_that_is_not_kept_is_not_resumed(fronts: list[ASGIApp], last_id: str, status: int) -> None:
    reply = asyncio.run(post_json(fronts[0], "/v1/completions", COMPLETION, **{"last-event-id": last_id}))
    assert reply.status == status, reply.body


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/branches", BODIES["/v1/branches"]),
        ("/v1/completions", {**COMPLETION, "prompt": ["who", "where was"]}),
    ],
    ids=["another route", "another prompt"],
)
def test_the_rest_is_told_for_the_same_request_only(
    fronts: list[ASGIApp], route: str, body: dict[str, Any]
) -> None:
    async def run() -> Reply:
        events = await read(fronts[0], "/v1/completions")
        return await post_json(fronts[1], route, body, **{"last-event-id": id_of(events[1])})

    reply = asyncio.run(run())
    assert reply.status == 400
    assert "send the same body again" in reply.error["message"]


def keep(streams: KeptStreams, id: str, num_steps: int = 1) -> EngineRequest:
    """A stream of some steps, which has ended."""
    request = replace(sample_request(), id=id).with_history()
    with streams.keep(request) as add:
        for _ in range(num_steps):
            add(token_step())
    return request


def token_step(adapter_version: str | None = None) -> PackedStep:
    return pack_step(StepOutput([Event(0, "a", 5)], adapter_version=adapter_version))


def test_streams_are_kept_for_a_while_and_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(kept_streams, "monotonic", lambda: now.time)
    monkeypatch.setattr(kept_streams, "_MAX_ITEMS", 10)
    streams = KeptStreams()
    for time, id in enumerate(("one", "two", "three")):
        now.time = time
        keep(streams, id, num_steps=4)
    assert streams.end("one") is None  # three streams of four tokens are too many
    history = streams.end("two")
    assert history is not None
    assert history.steps == (token_step(),) * 4
    now.time = 60 + 1.5
    assert streams.end("two") is None  # it has ended a minute ago
    assert streams.end("three") is not None


def test_an_open_stream_beyond_the_limit_is_dropped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_streams, "_MAX_ITEMS", 10)
    streams = KeptStreams()
    keep(streams, "ended", num_steps=4)
    request = replace(sample_request(), id="open").with_history()
    with streams.keep(request) as add:
        for _ in range(10):
            add(token_step())
        assert streams._num_items == 10  # in place of the one that has ended
        add(token_step())
        assert (streams._num_items, streams._streams) == (0, {})
        add(token_step())
        assert streams._num_items == 0
    assert streams.end("open") is None


def test_what_comes_after_a_stream_was_ended_is_not_part_of_it() -> None:
    streams = KeptStreams()
    request = sample_request().with_history()
    with streams.keep(request) as add:
        add(token_step())
        histories = [streams.end(request.id)]
        add(token_step())  # its cancelled branches
    histories.append(streams.end(request.id))
    assert [history and history.steps for history in histories] == [(token_step(),)] * 2


def test_of_two_histories_that_of_the_last_engine_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first engine was frozen, and ran again after another one had resumed the stream."""
    request = sample_request()
    first = StreamHistory(request, [token_step(""), *[token_step()] * 9])
    second = StreamHistory(request, [token_step(""), token_step(), token_step("")])

    async def answer(history: Any) -> Any:
        if isinstance(history, Exception):
            raise history
        return history

    async def ended(*histories: Any) -> StreamHistory:
        async def broadcast(*_: Any) -> list[Awaitable[Any]]:
            return [answer(history) for history in histories]

        monkeypatch.setattr(engine_client, "broadcast", broadcast)
        return await make_ingress(tmp_path).engines.end_stream("smp-1")

    assert asyncio.run(ended(first, None, second)) is second
    with pytest.raises(Exception, match="does not answer"):  # it may have the last part
        asyncio.run(ended(first, RuntimeError("lost")))

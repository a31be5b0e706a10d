"""A model that forks by itself behind the server: one text for a chat, a tree for /v1/branches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from asgi import Reply, make_ingress, send_request
from engine_loops import LoopStream, running_loop
from engines import COLUMNAR, ISOLATED
from forking import forking_engine
from starlette.types import ASGIApp

from parallelmind.config import RopeConfig
from parallelmind.engine.fork_parser import Fork
from parallelmind.engine.output import Event
from parallelmind.engine.request import Sample
from parallelmind.engine.tokenization import tokenize_request
from serving.engine.messages import (
    EngineRequest,
    PackedStep,
    StepOutput,
    pack_step,
    step_of_json,
    unpack_step,
)
from serving.ingress.failover import RequestReplay
from serving.protocol.openai_response import linear

END = "</s>"
LIST = {0: "see {one|two}", 1: " is" + END, 2: " are in" + END, 3: " so" + END}
TEXT = "see one istwo are in so"
BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])


def with_app(
    folder: Path, act: Callable[[ASGIApp], Coroutine[Any, Any, Any]], config: RopeConfig = ISOLATED
) -> Any:
    async def run() -> Any:
        with running_loop(forking_engine(config, LIST)) as loop:
            ingress = make_ingress(folder, open_stream=lambda request: LoopStream(loop, request))
            return await asyncio.wait_for(act(ingress.__serve_build_asgi_app__()), 60)

    return asyncio.run(run())


async def post(app: ASGIApp, path: str, body: dict[str, Any]) -> Reply:
    headers = {"content-type": "application/json"}
    content = json.dumps({"model": "base", **body}).encode()
    return await send_request(app, "POST", path, headers, [content])


CHAT = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 60, "temperature": 0}


@BOTH
def test_a_chat_client_gets_one_text(tmp_path: Path, config: RopeConfig) -> None:
    async def act(app: ASGIApp) -> tuple[Reply, Reply]:
        return (
            await post(app, "/v1/chat/completions", CHAT),
            await post(app, "/v1/chat/completions", {**CHAT, "stream": True}),
        )

    whole, streamed = with_app(tmp_path, act, config)
    (choice,) = json.loads(whole.body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (TEXT, "stop")
    choices = [event["choices"][0] for event in streamed.events]
    assert "".join(choice["delta"]["content"] for choice in choices) == TEXT
    assert {choice["index"] for choice in choices} == {0}
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]


def test_several_choices_fork_each_for_itself(tmp_path: Path) -> None:
    script = {**LIST}

    async def run() -> Reply:
        engine = forking_engine(ISOLATED, lambda seed, rank: script.get(rank, ""))
        with running_loop(engine) as loop:
            ingress = make_ingress(tmp_path, open_stream=lambda request: LoopStream(loop, request))
            app = ingress.__serve_build_asgi_app__()
            return await asyncio.wait_for(post(app, "/v1/chat/completions", {**CHAT, "n": 2}), 60)

    choices = json.loads(asyncio.run(run()).body)["choices"]
    assert [choice["message"]["content"] for choice in choices] == [TEXT, TEXT]


@BOTH
def test_a_client_of_branches_gets_the_tree(tmp_path: Path, config: RopeConfig) -> None:
    body = {"main": "The passage.", "branches": ["Who"], "max_tokens": 60}

    async def act(app: ASGIApp) -> tuple[Reply, Reply]:
        return await post(app, "/v1/branches", body), await post(
            app, "/v1/branches", {**body, "stream": True}
        )

    whole, streamed = with_app(tmp_path, act, config)
    (root,) = json.loads(whole.body)["branches"]
    assert (root["text"], root["finish_reason"]) == ("see ", "forked")
    assert [(item["title"], item["text"], item["path"]) for item in root["branches"]] == [
        ("one", " is", "branches[0].branches[0]"),
        ("two", " are in", "branches[0].branches[1]"),
    ]
    assert root["reduce"]["text"] == " so"
    deltas = [delta for event in streamed.events for delta in event.get("deltas", ())]
    (forked,) = [delta for delta in deltas if "fork" in delta]
    assert forked["finish_reason"] == "forked"
    assert forked["fork"] == {
        "branches": [
            {"index": 1, "path": "branches[0].branches[0]", "title": "one"},
            {"index": 2, "path": "branches[0].branches[1]", "title": "two"},
        ],
        "reduce": {"index": 3, "path": "branches[0].reduce"},
    }


def decoded(request: EngineRequest, config: RopeConfig) -> list[PackedStep]:
    async def run() -> list[Any]:
        with running_loop(forking_engine(config, LIST)) as loop:
            return [message async for message in LoopStream(loop, request)]

    return asyncio.run(run())


def tokens_of(steps: list[PackedStep]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for event in (event for step in steps for event in unpack_step(step).events):
        tokens.setdefault(event.branch, []).extend([] if event.token is None else [event.token])
    return tokens


@BOTH
def test_another_engine_goes_on_wherever_the_first_one_was_lost(config: RopeConfig) -> None:
    settings = {"max_new_tokens": 60, "temperature": 1.0, "seed": 5}
    sample = tokenize_request(
        forking_engine(config, LIST).tokenizer, Sample("The passage.", ["Who"]), None, None, settings
    )
    request = EngineRequest("smp-1", "base", [sample])
    steps = decoded(request, config)
    for cut in range(1, len(steps)):
        replay = RequestReplay(request)
        for step in steps[:cut]:
            replay.record(step)
        if replay.is_complete:
            continue
        rest = decoded(replay.remaining_request(), config)
        assert tokens_of([*steps[:cut], *rest]) == tokens_of(steps), f"after {cut} steps"


def test_a_chat_client_gets_one_text_of_two_engines() -> None:
    """The second engine has decoded other samples before."""
    sample = tokenize_request(
        forking_engine(ISOLATED, LIST).tokenizer, Sample("The passage.", ["Who"]), None, None, {"seed": 5}
    )
    steps = [unpack_step(step) for step in decoded(EngineRequest("smp-1", "base", [sample]), ISOLATED)]

    async def text(cut: int) -> str:
        async def moved() -> AsyncIterator[StepOutput]:
            for number, step in enumerate(steps):
                yield step._replace(
                    events=[event._replace(sample=5 * (number >= cut)) for event in step.events]
                )

        shown = [event async for step in linear(moved()) for event in step.events]
        assert [event.finish_reason for event in shown if event.finish_reason] == ["stop"]
        assert {event.branch for event in shown} == {0}
        return "".join(event.text for event in shown)

    assert {asyncio.run(text(cut)) for cut in range(len(steps))} == {TEXT}


def test_a_fork_survives_json() -> None:
    event = Event(0, "", 5, "forked", fork=Fork(("one", "two"), (1, 2), 3))
    packed = pack_step(StepOutput([event]))
    assert unpack_step(step_of_json(json.loads(json.dumps(packed)))).events == [event]

"""Answers of one HTTP request do not depend on each other, and its samples are one response."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from asgi import metric_value, post_json, send_request
from engine_loops import with_server
from starlette.types import ASGIApp

from parallelmind.engine.engine import Engine
from serving.ingress.ingress import Ingress

B = "who works in the passage?"
OTHERS = ["the question is", "what lives where, and"]
LONG = "The answer to the question is in the passage: who lives where? "
GREEDY = {"temperature": 0}
SEEDED = {"temperature": 1, "seed": 5}


async def complete(app: ASGIApp, prompt: Any, **settings: Any) -> Any:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True, **settings}
    return await post_json(app, "/v1/completions", body)


async def texts(app: ASGIApp, prompt: Any, **settings: Any) -> list[str]:
    reply = json.loads((await complete(app, prompt, **settings)).body)
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(reply["choices"])))
    return [choice["text"] for choice in reply["choices"]]


@pytest.mark.parametrize("settings", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("beginning", ["", LONG], ids=["", "shared"])
def test_the_answer_to_a_prompt_is_the_same_alone_beside_others_and_in_any_order(
    tmp_path: Path, beginning: str, settings: dict[str, Any]
) -> None:
    prompts = [beginning + text for text in (B, *OTHERS)]

    async def act(app: ASGIApp, *_: Any) -> None:
        alone = [(await texts(app, prompt, **settings))[0] for prompt in prompts]
        assert await texts(app, prompts, **settings) == alone
        assert await texts(app, prompts[::-1], **settings) == alone[::-1]
        twice = await texts(app, prompts, n=2, **settings)
        assert twice[::2] == alone
        assert twice[:2] == await texts(app, prompts[0], n=2, **settings)
        if settings == GREEDY:
            assert twice[1::2] == alone
        else:
            assert set(twice[1::2]).isdisjoint(alone)

    with_server(tmp_path, act)


def test_answers_depend_on_each_other_where_that_is_asked_for(tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> tuple[list[str], list[str]]:
        coupled = await texts(app, [B, *OTHERS], visibility="columnar", **GREEDY)
        return coupled, await texts(app, [B, *OTHERS], **GREEDY)

    coupled, independent = with_server(tmp_path, act)
    assert coupled != independent


def test_the_choices_of_a_chat_are_those_of_one_choice(tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        def body(**settings: Any) -> dict[str, Any]:
            messages = [{"role": "user", "content": B}]
            return {"model": "tiny", "messages": messages, "max_tokens": 8, "ignore_eos": True, **settings}

        async def answers(**settings: Any) -> list[str]:
            reply = json.loads((await post_json(app, "/v1/chat/completions", body(**settings))).body)
            return [choice["message"]["content"] for choice in reply["choices"]]

        (alone,) = await answers(**GREEDY)
        assert await answers(n=3, **GREEDY) == [alone] * 3
        seeded = await answers(n=3, **SEEDED)
        assert seeded[:1] == await answers(**SEEDED)
        assert len(set(seeded)) == 3

    with_server(tmp_path, act)


def test_a_stream_of_several_samples_adds_up_to_the_whole_response(tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        whole = json.loads((await complete(app, [B, *OTHERS], n=2, **SEEDED)).body)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        reply = await complete(app, [B, *OTHERS], n=2, **SEEDED, **options)
        streamed, usage = [""] * 6, None
        for part in reply.events:
            usage = part.get("usage") or usage
            for choice in part["choices"]:
                streamed[choice["index"]] += choice["text"]
        assert streamed == [choice["text"] for choice in whole["choices"]]
        assert usage == whole["usage"]

    with_server(tmp_path, act)


def test_usage_and_metrics_count_every_prompt_once(tmp_path: Path) -> None:
    async def act(app: ASGIApp, _: Engine, ingress: Ingress) -> None:
        prompts = [[5] * 7, [6] * 9]
        usage = json.loads((await complete(app, prompts, n=3)).body)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (16, 3 * 2 * 8)
        shared = [[*range(40, 60), 5], [*range(40, 60), 6]]
        assert json.loads((await complete(app, shared)).body)["usage"]["prompt_tokens"] == 42
        assert metric_value(ingress.metrics, "tokens_total", kind="prompt") == 16 + 42

    with_server(tmp_path, act)


def test_a_client_that_leaves_ends_all_samples_of_its_request(tmp_path: Path) -> None:
    async def act(app: ASGIApp, engine: Engine, _: Ingress) -> None:
        body = {
            "model": "tiny",
            "prompt": [B, *OTHERS],
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
        }
        client = asyncio.create_task(
            send_request(
                app,
                "POST",
                "/v1/completions",
                {"content-type": "application/json"},
                [json.dumps({**body, "stream": True}).encode()],
                reads=3,
            )
        )
        while engine.stats().live_branches < 3:
            await asyncio.sleep(0.01)
        client.cancel()
        while engine.stats().live_branches:
            await asyncio.sleep(0.01)

    with_server(tmp_path, act)


def test_a_request_with_a_prompt_that_the_engine_refuses_is_rejected_whole(tmp_path: Path) -> None:
    async def act(app: ASGIApp, engine: Engine, _: Ingress) -> None:
        reply = await complete(app, [[5, 6], [10**6]])
        assert (reply.status, "the model's vocabulary" in reply.error["message"]) == (400, True)
        assert not engine.busy or engine.stats().live_branches == 0

    with_server(tmp_path, act)

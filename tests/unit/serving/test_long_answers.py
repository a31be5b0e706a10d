"""Long answers take cache blocks as they grow, so requests with a high max_tokens are decoded together."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from asgi import post_json, send_request
from engine_loops import with_server
from starlette.types import ASGIApp

from parallelmind.engine.engine import Engine

CACHE_TOKENS = 4096
LONG = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4000, "ignore_eos": True}


def test_requests_with_a_high_max_tokens_are_decoded_at_the_same_time(tmp_path: Path) -> None:
    """Each of them could fill the whole cache. Autoscaling counts them as live branches."""

    async def act(app: ASGIApp, engine: Engine, _: Any) -> None:
        body = [json.dumps({**LONG, "stream": True}).encode()]
        headers = {"content-type": "application/json"}
        clients = [
            asyncio.create_task(send_request(app, "POST", "/v1/completions", headers, body, reads=3))
            for _ in range(16)
        ]
        while engine.stats().live_branches < 16:
            assert engine.stats().held_tokens < CACHE_TOKENS / 2
            await asyncio.sleep(0.01)
        assert engine.stats().waiting_branches == 0
        for client in clients:
            client.cancel()

    with_server(tmp_path, act, cache_tokens=CACHE_TOKENS)


def test_choices_that_do_not_fit_the_cache_together_are_answered(tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        body = {**LONG, "n": 3, "max_tokens": 250, "temperature": 1, "seed": 4}
        prompts = [[*range(40, 70), 5], [*range(40, 70), 6]]
        reply = json.loads((await post_json(app, "/v1/completions", {**body, "prompt": prompts})).body)
        assert [choice["index"] for choice in reply["choices"]] == list(range(6))
        assert reply["usage"]["completion_tokens"] == 6 * 250
        alone = json.loads((await post_json(app, "/v1/completions", {**body, "prompt": prompts[1]})).body)
        texts = [choice["text"] for choice in reply["choices"]]
        assert texts[3:] == [choice["text"] for choice in alone["choices"]]
        assert len(set(texts)) == 6

    with_server(tmp_path, act, cache_tokens=512)


def test_siblings_that_do_not_fit_the_cache_together_are_refused(tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        body = {**LONG, "n": 3, "max_tokens": 250, "visibility": "columnar"}
        reply = await post_json(app, "/v1/completions", body)
        assert (reply.status, "the cache holds" in reply.error["message"]) == (400, True)

    with_server(tmp_path, act, cache_tokens=512)

"""A body as long as it may be, right or wrong, holds nobody up: the front has one event loop for all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
from asgi import TOLD, ask, front, post
from pydantic import ValidationError

from serving.protocol.branches import BranchesRequest
from serving.protocol.openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

MANY: list[Any] = [{}] * 1000


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((CompletionRequest, field, MANY) for field in ("prompt", "stop")),
        *((ChatRequest, "messages", value) for value in (MANY, [{"role": "user", "content": MANY}])),
        *((BranchesRequest, field, MANY) for field in ("main", "branches")),
        (DetokenizeRequest, "tokens", MANY),
        (CompletionRequest, "logit_bias", {str(number): "" for number in range(1000)}),
        (CompletionRequest, "logit_bias", {f"x{number}": 1 for number in range(1000)}),
    ],
)
def test_of_many_wrong_items_one_is_told(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field) as error:
        kind(**{field: value})
    assert (
        len([found for found in error.value.errors() if found["loc"][0] == field]) <= 3
    )  # of each kind that it might be


def test_of_many_unknown_fields_one_is_told() -> None:
    with pytest.raises(ValidationError) as error:
        TokenizeRequest(**{"prompt": "who", **{f"x{number}": 1 for number in range(1000)}})
    assert [found["loc"] for found in error.value.errors()] == [("x0",)]


@pytest.mark.parametrize("says_how_long", [True, False])
@pytest.mark.parametrize(("size", "aside"), [(100, False), (30_000, True)])
def test_a_long_body_is_encoded_aside_whether_it_says_how_long_it_is_or_not(
    tmp_path: Path, size: int, aside: bool, says_how_long: bool
) -> None:
    served, threads = front(tmp_path, TOLD), list[Any]()
    encode = served.asker.completion

    def noted(body: Any) -> Any:
        threads.append(current_thread())
        return encode(body)

    served.asker.completion = noted
    body = b'{"model": "tiny", "prompt": "%s"}' % (b"who " * (size // 4))
    headers = {"content-type": "application/json"} | (
        {"content-length": str(len(body))} if says_how_long else {}
    )
    asyncio.run(
        ask(served.__serve_build_asgi_app__(), "POST", "/v1/completions", headers, [body[:50], body[50:]])
    )
    assert [thread is main_thread() for thread in threads] == [not aside]


def test_many_tokens_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI's own way looks at each of them."""
    monkeypatch.setattr("fastapi.routing.jsonable_encoder", None)
    app = front(tmp_path).__serve_build_asgi_app__()
    tokens = json.loads(asyncio.run(post(app, "/tokenize", {"prompt": "who"})).body)["tokens"]
    assert json.loads(asyncio.run(post(app, "/detokenize", {"tokens": tokens})).body) == {"prompt": "who"}

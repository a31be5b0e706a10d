"""A long body, valid or not, does not block the event loop that all requests of an ingress share."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
from asgi import ONE_TOKEN_STEPS, ingress_app, make_ingress, post_json, send_request
from pydantic import ValidationError

from serving.protocol.branches import BranchesRequest
from serving.protocol.openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

WRONG_ITEMS: list[Any] = [{}] * 1000


@pytest.mark.parametrize(
    ("schema", "field", "value"),
    [
        *((CompletionRequest, field, WRONG_ITEMS) for field in ("prompt", "stop")),
        *(
            (ChatRequest, "messages", value)
            for value in (WRONG_ITEMS, [{"role": "user", "content": WRONG_ITEMS}])
        ),
        *((BranchesRequest, field, WRONG_ITEMS) for field in ("main", "branches")),
        (DetokenizeRequest, "tokens", WRONG_ITEMS),
        (CompletionRequest, "logit_bias", {str(number): "" for number in range(1000)}),
        (CompletionRequest, "logit_bias", {f"x{number}": 1 for number in range(1000)}),
    ],
)
def test_validation_stops_at_the_first_wrong_item(schema: Any, field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field) as error:
        schema(**{field: value})
    errors = [item for item in error.value.errors() if item["loc"][0] == field]
    assert len(errors) <= 3  # one for each type that the item might have


def test_one_unknown_field_is_reported() -> None:
    with pytest.raises(ValidationError) as error:
        TokenizeRequest(**{"prompt": "who", **{f"x{number}": 1 for number in range(1000)}})
    assert [item["loc"] for item in error.value.errors()] == [("x0",)]


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize(("size", "in_thread"), [(100, False), (30_000, True)])
def test_a_long_body_is_tokenized_in_a_thread_with_or_without_a_content_length(
    tmp_path: Path, size: int, in_thread: bool, has_length: bool
) -> None:
    ingress, threads = make_ingress(tmp_path, ONE_TOKEN_STEPS), list[Any]()
    completion = ingress.preprocessor.completion

    def record_thread(body: Any) -> Any:
        threads.append(current_thread())
        return completion(body)

    ingress.preprocessor.completion = record_thread  # type: ignore[method-assign]
    body = b'{"model": "tiny", "prompt": "%s"}' % (b"who " * (size // 4))
    headers = {"content-type": "application/json"}
    if has_length:
        headers["content-length"] = str(len(body))
    app = ingress.__serve_build_asgi_app__()
    asyncio.run(send_request(app, "POST", "/v1/completions", headers, [body[:50], body[50:]]))
    assert [thread is main_thread() for thread in threads] == [not in_thread]


def test_token_lists_are_not_visited_by_fastapis_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastapi.routing.jsonable_encoder", None)
    app = ingress_app(tmp_path)
    tokens = json.loads(asyncio.run(post_json(app, "/tokenize", {"prompt": "who"})).body)["tokens"]
    reply = asyncio.run(post_json(app, "/detokenize", {"tokens": tokens}))
    assert json.loads(reply.body) == {"prompt": "who"}

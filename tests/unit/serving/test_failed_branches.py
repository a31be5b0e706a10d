"""What a client receives if branches end with an error: OpenAI's error format, and an error per branch."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from asgi import Reply, ingress_app, post_json

from parallelmind.engine.output import Event
from serving.engine.messages import BranchStarted, StepOutput

REASON = "the model's logits are not finite (NaN or infinity)"
STARTED = StepOutput([], [BranchStarted(branch, (branch, 0)) for branch in range(2)])
FAILED = [Event(branch, "", None, "error", error=REASON) for branch in range(3)]
ONE_FAILS = [
    STARTED,
    StepOutput([Event(0, "A", 65, pos2d=(0, 1)), FAILED[1]]),
    StepOutput([Event(0, "B", 66, "length", pos2d=(0, 2))]),
]
ALL_FAIL = [STARTED, StepOutput([Event(0, "A", 65, pos2d=(0, 1))], []), StepOutput(FAILED[:2])]

OPENAI: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "who", "n": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "who"}], "n": 2},
}
BRANCHES: dict[str, Any] = {"model": "tiny", "main": [5], "branches": [{"text": "who"}, {"text": "where"}]}


def send(folder: Path, path: str, body: dict[str, Any], steps: list[StepOutput]) -> Reply:
    return asyncio.run(post_json(ingress_app(folder, steps), path, body))


def refuse_constant(name: str) -> Any:
    pytest.fail(f"{name} is not JSON")


def stream_events(reply: Reply) -> list[Any]:
    *events, end = re.findall(r"^data: (.*)$", reply.body.decode(), re.MULTILINE)
    assert (reply.status, end) == (200, "[DONE]")
    return [json.loads(event, parse_constant=refuse_constant) for event in events]


def failure(param: str) -> dict[str, Any]:
    return {"message": f"{param}: {REASON}", "type": "server_error", "param": None, "code": "decoding_failed"}


@pytest.mark.parametrize("path", OPENAI)
def test_a_choice_that_ends_with_an_error_is_answered_with_500(path: str, tmp_path: Path) -> None:
    reply = send(tmp_path, path, OPENAI[path], ONE_FAILS)
    assert (reply.status, reply.headers["content-type"]) == (500, "application/json")
    assert json.loads(reply.body) == {"error": failure("choices[1]")}


@pytest.mark.parametrize("path", OPENAI)
def test_a_stream_ends_with_the_error_of_a_choice(path: str, tmp_path: Path) -> None:
    *parts, last = stream_events(send(tmp_path, path, {**OPENAI[path], "stream": True}, ONE_FAILS))
    assert [choice["index"] for part in parts for choice in part["choices"]] == [0]
    assert last == {"error": failure("choices[1]")}


def test_a_branches_response_holds_the_error_of_each_branch(tmp_path: Path) -> None:
    reply = send(tmp_path, "/v1/branches", BRANCHES, ONE_FAILS)
    outputs = json.loads(reply.body)["branches"]
    assert reply.status == 200
    assert [(item["text"], item["finish_reason"], item["error"]) for item in outputs] == [
        ("AB", "length", None),
        ("", "error", REASON),
    ]
    failed = send(tmp_path, "/v1/branches", BRANCHES, ALL_FAIL)
    assert (failed.status, json.loads(failed.body)) == (500, {"error": failure("branches[0]")})


@pytest.mark.parametrize(("steps", "num_failed"), [(ONE_FAILS, 1), (ALL_FAIL, 2)])
def test_a_stream_of_branches_holds_the_error_of_each_branch(
    steps: list[StepOutput], num_failed: int, tmp_path: Path
) -> None:
    *parts, done = stream_events(send(tmp_path, "/v1/branches", {**BRANCHES, "stream": True}, steps))
    deltas = [delta for part in parts for delta in part.get("deltas", [])]
    assert [(item["index"], item["token"]) for item in deltas][:1] == [(0, 65)]
    errors = [item["error"] for item in deltas if item["finish_reason"] == "error"]
    assert errors == [REASON] * num_failed
    assert done["object"] == "branches.done"


def test_a_reduce_branch_that_fails_before_its_first_token_does_not_hide_the_others(tmp_path: Path) -> None:
    steps = [*ONE_FAILS, StepOutput([FAILED[2]])]
    reply = send(tmp_path, "/v1/branches", {**BRANCHES, "reduce": "all"}, steps)
    body = json.loads(reply.body)
    assert [item["finish_reason"] for item in body["branches"]] == ["length", "error"]
    assert (body["reduce"]["finish_reason"], body["reduce"]["error"]) == ("error", REASON)


@pytest.mark.parametrize("path", [*OPENAI, "/v1/branches"])
def test_a_stream_never_holds_a_number_that_json_lacks(path: str, tmp_path: Path) -> None:
    """Before, an event held a bare NaN, which ends a client's stream with a syntax error."""
    steps = [STARTED, StepOutput([Event(branch, "A", 65, "stop", math.nan) for branch in range(2)])]
    body = {**OPENAI.get(path, BRANCHES), "stream": True}
    assert stream_events(send(tmp_path, path, body, steps))[-1]["error"]["code"] == "internal_error"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**OPENAI["/v1/completions"], "prompt": "\ud83e"}),
        ("/v1/branches", {**BRANCHES, "main": "\ud83e"}),
        ("/v1/branches", {**BRANCHES, "branches": [{"text": "\ud83e"}]}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "\ud83e"}]}),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(path: str, body: dict[str, Any], tmp_path: Path) -> None:
    reply = send(tmp_path, path, body, ONE_FAILS)
    assert (reply.status, reply.error["code"]) == (400, "invalid_value")

"""/v1/responses: a conversation in, one answer out, in the objects and events of OpenAI's package."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from asgi import ingress_app, make_ingress, post_json
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.types import ASGIApp

from parallelmind.engine.output import Event
from serving.engine.messages import BranchStarted, StepOutput
from serving.protocol.openai import ChatRequest
from serving.protocol.responses import ResponsesRequest

BODY: dict[str, Any] = {"model": "tiny", "input": "who"}
STEPS = [
    StepOutput([], [BranchStarted(0, (0, 0))]),
    StepOutput([Event(0, "A", 65, None, -0.5, ((65, -0.5),)), Event(0, "", 66, None, -1.0)], []),
    StepOutput([Event(0, "Bü", 67, "stop", -2.0, ((66, -0.5),))], []),
]
PLAIN = [
    StepOutput([Event(e.branch, e.text, e.token, e.finish_reason) for e in s.events], s.started)
    for s in STEPS
]
CUT = [*PLAIN[:2], StepOutput([Event(0, "Bü", 67, "length")], [])]


def post(app: ASGIApp, body: dict[str, Any]) -> Any:
    return asyncio.run(post_json(app, "/v1/responses", body))


def whole(folder: Path, steps: list[StepOutput], **fields: Any) -> Response:
    reply = post(ingress_app(folder, steps), {**BODY, **fields})
    assert reply.status == 200, reply.body
    return Response.model_validate_json(reply.body)


def streamed(folder: Path, steps: list[StepOutput], **fields: Any) -> list[Any]:
    reply = post(ingress_app(folder, steps), {**BODY, **fields, "stream": True})
    *blocks, end, _ = reply.body.decode().split("\n\n")
    assert end == "data: [DONE]"
    adapter, events = TypeAdapter(ResponseStreamEvent), []
    for block in blocks:
        name, data = block.split("\n")
        events.append(adapter.validate_python(json.loads(data.removeprefix("data: "))))
        assert name == f"event: {events[-1].type}"
    return events


def test_a_response_is_openais_object(tmp_path: Path) -> None:
    response = whole(tmp_path, PLAIN, instructions="be brief", metadata={"run": "1"}, store=True)
    assert (response.status, response.output_text, response.error) == ("completed", "ABü", None)
    assert response.id.startswith("resp-")
    assert (response.instructions, response.metadata, response.model) == ("be brief", {"run": "1"}, "tiny")
    assert response.usage is not None
    assert response.usage.output_tokens == 3
    assert response.usage.total_tokens == response.usage.input_tokens + 3


def test_an_answer_that_is_cut_is_incomplete(tmp_path: Path) -> None:
    response = whole(tmp_path, CUT, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert streamed(tmp_path, CUT)[-1].type == "response.incomplete"


@pytest.mark.parametrize("asks", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 1}])
def test_a_stream_adds_up_to_the_response(tmp_path: Path, asks: dict[str, Any]) -> None:
    events, response = streamed(tmp_path, STEPS, **asks), whole(tmp_path, STEPS, **asks)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    deltas = events[4:7]
    assert "".join(event.delta for event in deltas) == response.output_text == events[7].text
    part = response.output[0].content[0]  # type: ignore[union-attr, index]
    assert [entry.logprob for event in deltas for entry in event.logprobs] == [-0.5, -1.0, -2.0]
    assert [entry.logprob for entry in part.logprobs] == [-0.5, -1.0, -2.0]  # type: ignore[union-attr]
    assert events[-1].response.output_text == response.output_text
    assert {event.item_id for event in deltas} == {events[-1].response.output[0].id}
    assert events[0].response.id == events[-1].response.id


def test_the_conversation_is_that_of_a_chat(tmp_path: Path) -> None:
    preprocessor = make_ingress(tmp_path).preprocessor
    answer = whole(tmp_path, PLAIN).output[0].model_dump()
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "who"}]},
        answer,
        {"role": "user", "content": "b"},
    ]
    asked = preprocessor.responses(
        ResponsesRequest(model="tiny", input=turns, instructions="be brief", seed=1, max_output_tokens=9)
    )
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "who"},
        {"role": "assistant", "content": "ABü"},
        {"role": "user", "content": "b"},
    ]
    chat = preprocessor.chat(ChatRequest(model="tiny", messages=messages, seed=1, max_tokens=9))
    assert [sample.tokens.split() for sample in asked.samples] == [s.tokens.split() for s in chat.samples]
    assert [sample.params for sample in asked.samples] == [sample.params for sample in chat.samples]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp-1"),
        ("conversation", "conv-1"),
        ("prompt", {"id": "p"}),
        ("background", True),
        ("truncation", "auto"),
        ("tools", [{"type": "web_search"}]),
        ("text", {"format": {"type": "json_object"}}),
        ("input", [{"type": "function_call_output", "call_id": "1", "output": "a"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]),
        ("input", []),
        ("max_output_tokens", 10**6),
        ("input", "word " * 5000),
        ("max_tokens", 5),
    ],
)
def test_what_is_not_done_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    reply = post(ingress_app(tmp_path, PLAIN), {**BODY, field: value})
    assert (reply.status, reply.error["param"].split(".")[0].split("[")[0]) == (400, field)


def test_fields_without_effect_are_accepted(tmp_path: Path) -> None:
    idle = {
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "truncation": "disabled",
        "tools": [],
        "tool_choice": "auto",
        "include": ["reasoning.encrypted_content"],
        "stream_options": {"include_obfuscation": False},
        "previous_response_id": None,
    }
    assert whole(tmp_path, PLAIN, **idle).output_text == "ABü"

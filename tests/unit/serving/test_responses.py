"""/v1/responses: a conversation in, one answer out, in the objects and events of OpenAI's package."""

from __future__ import annotations

import asyncio
import json
import math
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
        _, name, data = block.split("\n")
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
        ("tools", [{"type": "function", "name": "a", "defer_loading": True}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "name": "none"}),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": []}),
        ("text", {"format": {"type": "json_schema", "name": "a"}}),
        ("text", {"format": {"type": "json_schema", "name": "a", "schema": {"minLength": 10**6}}}),
        ("text", {"format": {"type": "text", "schema": {}}}),
        ("input", [{"type": "function_call", "call_id": "1", "name": "a", "arguments": "[1]"}]),
        ("input", [{"type": "item_reference", "id": "1"}]),
        ("input", [{"type": "reasoning", "summary": []}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]),
        ("input", []),
        ("max_output_tokens", 10**6),
        ("input", "word " * 5000),
        ("max_tokens", 5),
        ("metadata", {"a": math.nan}),
        ("metadata", {"a": "\ud83d"}),
        ("user", "\ud83d"),
        ("tools", [{"type": "function", "name": "a", "parameters": {"default": math.inf}}]),
        ("text", {"format": {"type": "json_schema", "name": "a", "schema": {"description": "\ud83d"}}}),
        ("input", [{"type": "function_call", "call_id": "1", "name": "a", "arguments": '{"a": "\\ud83d"}'}]),
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


TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def steps_of(*texts: str, reason: str = "stop") -> list[StepOutput]:
    events = [Event(0, text, 65, None) for text in texts]
    events[-1] = events[-1]._replace(finish_reason=reason)
    return [StepOutput([], [BranchStarted(0, (0, 0))]), *(StepOutput([event], []) for event in events)]


def test_calls_of_tools_are_items_after_the_text(tmp_path: Path) -> None:
    steps = steps_of("I ask", ". ", CALL[:30], CALL[30:], CALL)
    response = whole(tmp_path, steps, tools=[TOOL])
    text, *calls = response.output
    assert response.output_text == "I ask."
    assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Oslo"}')] * 2  # type: ignore[union-attr]
    assert calls[0].call_id != calls[1].call_id  # type: ignore[union-attr]
    assert response.tools[0].model_dump(exclude_none=True) == TOOL
    assert (response.tool_choice, response.parallel_tool_calls, response.status) == (
        "auto",
        True,
        "completed",
    )
    single = whole(tmp_path, steps, tools=[TOOL], parallel_tool_calls=False)
    assert [item.type for item in single.output] == ["message", "function_call"]
    untold = whole(tmp_path, steps, tools=[TOOL], tool_choice="none")
    assert [item.type for item in untold.output] == ["message"]
    assert text.type == "message"


def test_a_call_is_streamed_as_openais_events(tmp_path: Path) -> None:
    events = streamed(tmp_path, steps_of(CALL[:9], CALL[9:]), tools=[TOOL])
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added, delta, done, item, end = events[2:]
    assert (added.item.name, added.item.arguments) == ("weather", "")
    assert delta.delta == done.arguments == item.item.arguments == '{"city": "Oslo"}'
    assert {added.item.id, item.item.id} == {delta.item_id} == {done.item_id}
    assert end.response.output == [item.item]


def test_text_and_calls_of_a_stream_have_places_of_their_own(tmp_path: Path) -> None:
    events = streamed(tmp_path, steps_of("I ", "ask.", CALL, " Done."), tools=[TOOL])
    places = {event.item_id: event.output_index for event in events if hasattr(event, "item_id")}
    assert sorted(places.values()) == [0, 1]
    response = events[-1].response
    assert response.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert [item.id for item in response.output] == sorted(places, key=lambda item: places[item])


def test_an_answer_that_is_cut_in_a_call_is_text(tmp_path: Path) -> None:
    response = whole(tmp_path, steps_of(CALL[:30], reason="length"), tools=[TOOL])
    assert (response.status, response.output_text) == ("incomplete", CALL[:30])


def test_a_history_with_calls_and_their_outputs_is_that_of_a_chat(tmp_path: Path) -> None:
    preprocessor = make_ingress(tmp_path).preprocessor
    output = whole(tmp_path, steps_of("I ask.", CALL), tools=[TOOL]).output
    call_id = output[1].call_id  # type: ignore[union-attr]
    result = {"type": "function_call_output", "call_id": call_id, "output": "sunny"}
    items = [{"role": "user", "content": "who"}, *(item.model_dump() for item in output), result]
    body = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}, "seed": 1}
    asked = preprocessor.responses(ResponsesRequest(model="tiny", input=items, max_output_tokens=9, **body))
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    call = {"id": call_id, "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "who"},
        {"role": "assistant", "content": "I ask.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "sunny"},
    ]
    told = {field: TOOL[field] for field in ("name", "description", "parameters")}
    body |= {"tools": [{"type": "function", "function": told}]}
    body |= {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    chat = preprocessor.chat(ChatRequest(model="tiny", messages=messages, max_tokens=9, **body))
    assert [sample.tokens.split() for sample in asked.samples] == [s.tokens.split() for s in chat.samples]
    assert [sample.params for sample in asked.samples] == [sample.params for sample in chat.samples]
    assert asked.samples[0].params[0].grammar is not None


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_text_format_is_the_grammar_of_a_response_format(tmp_path: Path, kind: str) -> None:
    preprocessor = make_ingress(tmp_path).preprocessor
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "a", "schema": schema, "strict": True} if kind == "json_schema" else {}
    form = {"type": kind, **named}
    asked = preprocessor.responses(ResponsesRequest(**BODY, text={"format": form}))
    chat = preprocessor.chat(
        ChatRequest(
            model="tiny",
            messages=[{"role": "user", "content": "who"}],
            response_format={"type": kind, **({"json_schema": named} if named else {})},
        )
    )
    assert asked.samples[0].params[0].grammar == chat.samples[0].params[0].grammar is not None
    response = whole(tmp_path, PLAIN, text={"format": form})
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == kind
    reply = post(ingress_app(tmp_path, PLAIN), {**BODY, "text": {"format": form}, "guided_regex": "a"})
    assert (reply.status, reply.error["param"]) == (400, "text.format")

"""Calls of tools are found in answers, whole or in pieces; chat templates get the tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tiny import tiny_tokenizer

import parallelmind as pm
from parallelmind.engine.grammar_compiler import GrammarCompiler
from serving.config import AppConfig
from serving.engine.messages import StepOutput
from serving.ingress.preprocessor import RequestPreprocessor
from serving.ingress.tool_prompts import ToolPrompts
from serving.protocol.branches import BranchesRequest
from serving.protocol.branches_response import BranchCalls, branches_chunks
from serving.protocol.openai import ChatRequest
from serving.protocol.tool_calls import ToolCallParser, ToolChatFormatter
from serving.protocol.tools import ToolFields

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Of today", "parameters": PARAMETERS},
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OSLO = ("weather", '{"city": "Oslo"}')

QWEN = (
    "{% if tools %}<s>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
BARE = (  # as Llama 3.1 writes calls
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def parsed(pieces: list[str], only_one: bool = False) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(["weather", "stop"], only_one)
    found = [*map(parser.push, pieces), parser.flush()]
    return "".join(piece.content for piece in found), [call for piece in found for call in piece.calls]


HALF = '{"name": "stop", "arguments": {"a": "\\ud83d"}}'
NAN = '{"name": "stop", "arguments": {"a": NaN}}'
ANSWERS = {
    "no call": ("It rains < in Oslo.", ("It rains < in Oslo.", [])),
    "tags": (CALL, ("", [OSLO])),
    "text before": (f"Let me see. {CALL}", ("Let me see.", [OSLO])),
    "two": (f"{CALL}\n{CALL}", ("", [OSLO, OSLO])),
    "list in tags": (
        '<tool_call>[{"name": "stop"}, {"name": "stop", "arguments": {}}]</tool_call>',
        ("", [("stop", "{}"), ("stop", "{}")]),
    ),
    "bare": (' {"name": "stop", "parameters": {"é": 1}}', ("", [("stop", '{"é": 1}')])),
    "arguments as text": ('{"name": "stop", "arguments": "{}"}', ("", [("stop", "{}")])),
    "arguments null": ('{"name": "stop", "arguments": null}', ("", [("stop", "{}")])),
    **{
        f"arguments {given}": (text := f'{{"name": "stop", "arguments": {given}}}', (text, []))
        for given in ("[1]", "5", '"Oslo"')
    },
    "not closed": (CALL.removesuffix("</tool_call>"), ("", [OSLO])),
    "cut off": (CALL[:30], (CALL[:30], [])),
    "another name": ('{"name": "rain"}', ('{"name": "rain"}', [])),
    "not a call": ("<tool_call>x</tool_call>!", ("<tool_call>x</tool_call>!", [])),
    "JSON": ('{"a": 1}', ('{"a": 1}', [])),
    "half a tag": ("a <tool_", ("a <tool_", [])),
    "half a character": (HALF, (HALF, [])),
    "NaN": (NAN, (NAN, [])),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_found_in_whole_answers_and_in_streams(name: str) -> None:
    text, expected = ANSWERS[name]
    assert parsed([text]) == expected
    assert parsed([*text]) == expected


def test_text_that_cannot_be_a_tag_is_told_at_once() -> None:
    parser = ToolCallParser(["stop"])
    assert parser.push("It rains <").content == "It rains"
    assert parser.push("b>").content == " <b>"


def test_only_the_first_of_several_calls_is_kept() -> None:
    assert parsed([*CALL, *CALL], only_one=True)[1] == [OSLO]


def test_a_stream_tells_calls_with_their_index_and_the_finish_reason() -> None:
    formatter = ToolChatFormatter("id", "tiny", None, ["weather"], only_one=False)
    text = f"{CALL}\n{CALL}"
    events = [pm.Event(0, letter, 5) for letter in text[:-1]] + [pm.Event(0, text[-1], 5, "stop")]
    chunks = [formatter.delta(event, index or None) for index, event in enumerate(events)]
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"]["arguments"] for call in calls] == [OSLO[1]] * 2
    assert len({call["id"] for call in calls}) == 2
    assert chunks[-1]["finish_reason"] == "tool_calls"
    whole = formatter.choice(0, events)
    assert whole["message"]["content"] is None
    told = [{field: value for field, value in call.items() if field != "index"} for call in calls]
    assert whole["message"]["tool_calls"] == told
    assert whole["finish_reason"] == "tool_calls"


def preprocessor(template: str | None = None) -> RequestPreprocessor:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    config = AppConfig.of({"base_model": "x", "served_name": "tiny"})
    return RequestPreprocessor(config, tokenizer, 4096)


def prompt(template: str | None, **fields: Any) -> str:
    request = ChatRequest(**{"model": "tiny", "messages": [{"role": "user", "content": "who"}], **fields})
    (sample,) = preprocessor(template).chat(request).samples
    return str(tiny_tokenizer().decode(sample.tokens.ids.tolist()))


HISTORY = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]


@pytest.mark.parametrize("template", [None, QWEN, BARE])
def test_tools_and_their_history_are_shown_to_the_model(template: str | None) -> None:
    text = prompt(template, messages=HISTORY, tools=[WEATHER])
    assert "Of today" in text
    assert '{"city": "Oslo"}' in text
    assert "sunny" in text
    assert (CALL in text) == (template != BARE)
    assert "Of today" not in prompt(template, messages=HISTORY, tools=[WEATHER], tool_choice="none")


def test_without_tools_the_prompt_is_that_of_the_template() -> None:
    assert prompt(None) == "<s>user\nwho</s>\n<s>assistant\n"


@pytest.mark.parametrize(
    ("template", "choice", "right", "wrong"),
    [
        (None, "required", f"{CALL}\n{CALL}", "It rains"),
        (QWEN, "required", CALL, CALL.replace("Oslo", "Pari")),
        (QWEN, {"type": "function", "function": {"name": "weather"}}, CALL, CALL.replace("weather", "stop")),
        (BARE, "required", '{"name": "stop", "parameters": {"a": 1}}', CALL),
    ],
)
def test_a_required_call_follows_the_format_and_the_parameters(
    template: str | None, choice: Any, right: str, wrong: str
) -> None:
    request = ChatRequest(
        model="tiny",
        messages=[{"role": "user", "content": "who"}],
        tools=[WEATHER, STOP],
        tool_choice=choice,
    )
    (sample,) = preprocessor(template).chat(request).samples
    grammar = sample.params[0].grammar
    assert grammar is not None
    tokenizer = tiny_tokenizer()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset([2]))
    for text, fits in ((right, True), (wrong, False)):
        matcher = compiler.matcher(grammar)
        for token in tokenizer.encode(text, add_special_tokens=False):
            matcher.accept(token)
        assert (matcher.error is None) == fits


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tools": [STOP, STOP]},
        {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [STOP]},
        {"tool_choice": "required", "tools": [STOP], "response_format": {"type": "json_object"}},
    ],
)
def test_contradicting_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(pm.UserError, match=next(iter(fields))):
        prompt(None, **fields)


def test_a_template_is_asked_only_for_what_it_shows() -> None:
    prompts = ToolPrompts(lambda turns, tools: json.dumps([turns, tools]))
    assert prompts.is_known
    assert not prompts.has_tags
    assert prompts.grammar(ToolFields(tools=[STOP])) is None


TURN = {"role": "user", "content": "Rain?"}


def branches(**fields: Any) -> Any:
    body = BranchesRequest(**{"model": "tiny", "branches": [TURN, "who"], "tools": [WEATHER], **fields})
    (sample,) = preprocessor().branches(body).samples
    return sample


def test_branches_that_are_messages_are_shown_the_tools_and_may_have_to_call_one() -> None:
    sample = branches(tool_choice="required")
    chat, text = sample.params
    asked = ChatRequest(model="tiny", messages=[TURN], tools=[WEATHER], tool_choice="required")  # type: ignore[list-item]
    (alone,) = preprocessor().chat(asked).samples
    assert chat.grammar == alone.params[0].grammar is not None
    assert text.grammar is None
    main, first, _ = sample.tokens.split()
    assert main + first == [token for ids in alone.tokens.split() for token in ids]
    shared = branches(branches=[TURN, TURN], tool_choice="auto")
    assert [params.grammar for params in shared.params] == [None, None]
    assert len(shared.tokens.split()[0]) > 10 * len(shared.tokens.split()[1])  # the tools are read once


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"branches": ["who"]}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        (
            {"tool_choice": "required", "branches": [{"messages": [TURN], "guided_regex": "a"}]},
            "tool_choice",
        ),
    ],
)
def test_tools_of_branches_that_cannot_be_used_are_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(pm.UserError, match=rf"^{field}\b"):
        branches(**fields)


def test_calls_of_a_branch_stand_beside_its_text() -> None:
    body = BranchesRequest(model="tiny", branches=[TURN, "who"], tools=[WEATHER])
    calls, text = BranchCalls("smp-1", body), f"{CALL}\n{CALL}"
    events = [pm.Event(0, letter, 5) for letter in text[:-1]] + [pm.Event(0, text[-1], 5, "stop")]
    found = [call for event in events for call in calls.add("branches[0]", event)]
    assert [(call.function.name, call.function.arguments) for call in found] == [OSLO, OSLO]
    assert len({call.id for call in found}) == 2
    assert [call for event in events for call in calls.add("branches[1]", event)] == []
    single = BranchCalls("smp-1", body.model_copy(update={"parallel_tool_calls": False}))
    assert sum(len(single.add("branches[0]", event)) for event in events) == 1


def test_only_the_delta_that_completes_a_call_holds_calls() -> None:
    body = BranchesRequest(model="tiny", branches=[TURN, "who"], tools=[WEATHER])
    request, calls = preprocessor().branches(body), BranchCalls("smp-1", body)

    async def steps() -> AsyncIterator[StepOutput]:
        yield StepOutput([pm.Event(0, CALL[:20], 5), pm.Event(1, "a", 5)])
        yield StepOutput([pm.Event(0, CALL[20:], 5, "stop"), pm.Event(1, "", None, "stop")])

    async def deltas() -> list[dict[str, Any]]:
        chunks = branches_chunks(request, steps(), calls)
        return [delta async for chunk in chunks for delta in chunk.get("deltas", [])]

    found = [delta.get("tool_calls") for delta in asyncio.run(deltas())]
    assert [calls and calls[0]["function"]["name"] for calls in found] == [None, None, "weather", None]

"""What a conversation holds reaches the text by the chat template, or the record is bad with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from converting import convert
from tiny import tiny_tokenizer

from parallelmind.data.convert.chat import ChatRenderer
from parallelmind.data.convert.conversation import parse_messages, parse_tools
from parallelmind.data.records import RecordError

# The templates below write no token that ends a turn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no special token after an answer:parallelmind.errors.UserNotice"
)

CALL = {"name": "weather", "arguments": {"city": "Paris"}}
CALL_TEXT = {"name": "weather", "arguments": json.dumps(CALL["arguments"])}
WRAPPED_CALL = {"type": "function", "function": CALL}
CALL_FORMS = [
    WRAPPED_CALL,
    CALL,
    CALL_TEXT,
    {"function": CALL_TEXT, "index": 0},
    {"name": "weather", "parameters": CALL["arguments"]},
    {"type": "tool_use", "name": "weather", "input": CALL["arguments"]},
]
TOOL = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
USER, ANSWER = {"role": "user", "content": "and there?"}, {"role": "assistant", "content": "it rains"}
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ ARGUMENTS }}]{% endfor %}"
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}{{ m.content }}" + CALLS + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
AS_OBJECT = WITH_TOOLS.replace("ARGUMENTS", "c.function.arguments | tojson")
AS_TEXT = WITH_TOOLS.replace("ARGUMENTS", "'' + c.function.arguments")
PRINTED = WITH_TOOLS.replace("ARGUMENTS", "c.function.arguments")
WITHOUT_CONTENT = AS_OBJECT.replace(
    "{{ m.content }}", "{% if m.content is defined and m.content is not none %}{{ m.content }}{% else %}"
).replace("| tojson }}]{% endfor %}", "| tojson }}]{% endfor %}{% endif %}")
STRIPPING = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")


def render(value: dict[str, Any], template: str = AS_OBJECT, key: str = "messages") -> list[str]:
    """The texts of a conversation by a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    records = ChatRenderer(tokenizer).records(parse_messages(value, key), True, parse_tools(value))
    return [record["text"] for record in records]


@pytest.mark.parametrize("content", [None, "", " "])
@pytest.mark.parametrize("call", CALL_FORMS)
def test_call_with_empty_content_is_rendered(content: Any, call: dict[str, Any]) -> None:
    turn = {"role": "assistant", "content": content, "tool_calls": [call], "refusal": None}
    result = {"role": "tool", "content": "rain", "tool_call_id": "call_1"}
    first, last = render({"messages": [USER, turn, result, ANSWER], "tools": [TOOL]})
    called = '<user>and there?<assistant>[weather {"city": "Paris"}]'
    assert first.endswith(called)
    assert last.endswith(f"{called}<tool>rain<assistant>it rains")
    assert first.startswith('<tools>[{"type": "function", "function": {"name": "weather"')


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT, PRINTED, WITHOUT_CONTENT])
def test_arguments_and_empty_content_have_the_form_that_the_template_needs(template: str) -> None:
    messages = [USER, {"role": "assistant", "content": None, "function_call": CALL_TEXT}]
    assert render({"messages": messages}, template) == [
        '<user>and there?<assistant>[weather {"city": "Paris"}]'
    ]


def test_turns_and_tools_may_be_json_text() -> None:
    value = {"messages": [USER, ANSWER], "tools": [TOOL]}
    assert render({key: json.dumps(item) for key, item in value.items()}) == render(value)
    assert render({"messages": [USER, ANSWER], "tools": "null"}) == render({"messages": [USER, ANSWER]})


def test_sharegpt_calls_and_tools_are_those_of_messages() -> None:
    turns = [
        {"from": "human", "value": "and there?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"w": "rain"}'},
        {"from": "gpt", "value": "it rains"},
    ]
    result = {"role": "function", "name": "weather", "content": '{"w": "rain"}'}
    messages = [USER, {"role": "assistant", "tool_calls": [CALL]}, result, ANSWER]
    tools = [{"type": "function", "function": TOOL}]
    expected = render({"messages": messages, "tools": tools})
    assert render({"conversations": turns, "tools": json.dumps([TOOL])}, key="conversations") == expected
    assert render({"messages": messages, "functions": [TOOL]}) == expected


def test_keys_of_other_formats_without_a_value_change_nothing() -> None:
    expected = render({"messages": [USER, ANSWER]})
    nulls = dict.fromkeys(("role", "content", "from", "value", "tool_calls", "weight", "name"))
    assert render({"messages": [{**nulls, **USER}, {**nulls, **ANSWER}]}) == expected
    turns = [{"from": "human", "value": USER["content"]}, {"from": "bot", "value": ANSWER["content"]}]
    assert render({"messages": [{**nulls, **turn} for turn in turns]}) == expected


@pytest.mark.parametrize(
    "parts",
    [
        ["and", " there?"],
        [{"type": "text", "text": text} for text in ("and", " ", "there?")],
        [{"type": "text", "value": USER["content"]}],
    ],
)
def test_parts_of_a_text_are_texts_or_objects_and_may_be_white_space(parts: list[Any]) -> None:
    assert render({"messages": [{**USER, "content": parts}, ANSWER]}) == render({"messages": [USER, ANSWER]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learnt(key: str) -> None:
    messages = [USER, {**ANSWER, key: "clouds are low"}]
    assert render({"messages": messages}) == [
        "<user>and there?<assistant><think>clouds are low</think>it rains"
    ]


@pytest.mark.parametrize(
    ("change", "template", "reason"),
    [
        ({"reasoning_content": "clouds"}, PLAIN, "has 'clouds', which the chat template leaves out"),
        (
            {"content": "<think>\nclouds\n</think>\n\nrain"},
            STRIPPING,
            "has 'clouds', which the chat template",
        ),
        ({"tool_calls": [CALL]}, PLAIN, "has a call of weather, which the chat template leaves out"),
        (
            {"tool_calls": [CALL, {"name": "time"}]},
            AS_OBJECT.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            "has a call of time, which the chat template leaves out",
        ),
    ],
)
def test_answer_that_the_template_leaves_out_is_bad(
    change: dict[str, Any], template: str, reason: str
) -> None:
    with pytest.raises(RecordError, match=reason):
        render({"messages": [USER, {**ANSWER, **change}]}, template)


def test_reason_is_that_of_the_form_that_is_rendered() -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(RecordError, match="has tools, which the chat template leaves out"):
        render({"messages": messages, "tools": [TOOL]}, AS_TEXT.replace("if tools", "if false"))


def test_context_that_the_template_leaves_out_is_bad() -> None:
    without_system = PLAIN.replace("messages", "messages if m.role != 'system'", 1)
    with pytest.raises(RecordError, match="has 'Be brief.', which the chat template leaves out"):
        render({"system": "Be brief.", "messages": [USER, ANSWER]}, without_system)
    with pytest.raises(RecordError, match="has tools, which the chat template leaves out"):
        render({"messages": [USER, ANSWER], "tools": [TOOL]}, PLAIN)


def test_reasoning_of_earlier_turns_is_left_to_the_template() -> None:
    thought = {**ANSWER, "content": "<think>clouds</think>it rains"}
    assert render({"messages": [USER, {**thought, "train": False}, USER, ANSWER]}, STRIPPING) == [
        "<user>and there?<assistant>it rains<user>and there?<assistant>it rains"
    ]


@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_empty_system_turn_is_no_turn(empty: str | None) -> None:
    expected = convert([{"messages": [USER, ANSWER]}])
    assert convert([{"messages": [{"role": "system", "content": empty}, USER, ANSWER]}]) == expected
    assert convert([{"system": empty, "messages": [USER, ANSWER]}]) == expected
    turns = [{"from": "system", "value": empty}, {"from": "human", "value": "and there?"}]
    assert convert([{"conversations": [*turns, {"from": "gpt", "value": "it rains"}]}]) == expected


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_system_text_beside_the_turns_is_the_first_turn(key: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = convert([{"messages": [system, USER, ANSWER]}])
    assert convert([{key: "Be brief.", "messages": [USER, ANSWER]}]) == expected
    assert convert([{key: "Be brief.", "messages": [system, USER, ANSWER]}]) == expected


@pytest.mark.parametrize(("key", "no"), [("weight", 0), ("weight", 0.0), ("weight", False), ("train", False)])
def test_weight_decides_whether_a_turn_is_a_target(key: str, no: Any) -> None:
    weighted = [USER, {**ANSWER, key: 1}, USER, {**ANSWER, "content": "no", key: no}]
    assert render({"messages": weighted}) == render({"messages": [USER, ANSWER]})


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({**ANSWER, "weight": 0.5}, "messages[1].weight=0.5 is neither 0 nor 1"),
        ({**ANSWER, "weight": "1"}, "messages[1].weight='1' is neither 0 nor 1"),
        ({**ANSWER, "weight": 1, "train": False}, "messages[1] has a weight and a train that contradict"),
        ({**USER, "train": True}, "messages[1].train=True marks a user turn"),
        ({**ANSWER, "weight": 0}, "has no assistant turn that answers something"),
        ({**ANSWER, "reasoning": "a", "thinking": "b"}, "different texts under reasoning and thinking"),
        ({**USER, "thinking": "b"}, "messages[1] is a user turn with thinking"),
        ({**USER, "tool_calls": [CALL]}, "messages[1] is a user turn with tool_calls"),
        ({**ANSWER, "tool_calls": ["x"]}, "messages[1].tool_calls[0] is not a JSON object with a function"),
        ({**ANSWER, "tool_calls": [{}]}, "messages[1].tool_calls[0].name is not text"),
        ({**ANSWER, "tool_calls": 3}, "messages[1].tool_calls is not a list of JSON objects"),
        ({**ANSWER, "function_call": {**CALL, "arguments": "{"}}, "function_call[0].arguments is not JSON"),
        ({**ANSWER, "function_call": {**CALL, "arguments": "[]"}}, "arguments is not a JSON object"),
        ({"role": "tool_call", "content": "call it"}, "messages[1].tool_calls is not JSON"),
    ],
)
def test_reason_of_a_bad_turn(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as error:
        render({"messages": [USER, turn]})
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"tools": "{"}, "tools is not JSON"),
        ({"tools": ["weather"]}, "tools[0] is not a JSON object"),
        ({"system": "a", "system_prompt": "b"}, "different texts under system and system_prompt"),
        ({"system": 3}, "system is not text"),
    ],
)
def test_reason_of_a_bad_value_beside_the_turns(beside: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as error:
        render({"messages": [USER, ANSWER], **beside})
    assert reason in str(error.value)


def test_two_different_system_texts_are_bad() -> None:
    with pytest.raises(RecordError, match="a system text beside another one in its turns"):
        render({"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ANSWER]})

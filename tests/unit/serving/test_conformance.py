"""The HTTP interface as OpenAI's clients use it: fields, history, echoes, errors and routes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from asgi import ONE_TOKEN_STEPS, Reply, ingress_app, make_ingress, post_json, send_request
from openai.types.chat import ChatCompletionMessage
from starlette.types import ASGIApp

from parallelmind.engine.output import Event, TokenLogprob
from serving.engine.messages import BranchStarted, StepOutput
from serving.protocol.openai import CompletionRequest

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "who"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "who"}]}
HARMLESS = {
    "metadata": {"run": "1"},
    "parallel_tool_calls": True,
    "prompt_cache_key": "key",
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "service_tier": "auto",
    "store": True,
    "user": "me",
}
HARMLESS_IN_CHATS = {"reasoning_effort": "low", "verbosity": "low", "modalities": ["text"]}
OFF = {"tools": [], "functions": [], "tool_choice": "auto", "function_call": "none", "audio": None}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> ASGIApp:
    return ingress_app(tmp_path_factory.mktemp("model"), ONE_TOKEN_STEPS, max_prompt_tokens=8192)


def post(app: ASGIApp, path: str, body: dict[str, Any]) -> Reply:
    return asyncio.run(post_json(app, path, body))


def get(app: ASGIApp, path: str, method: str = "GET") -> Reply:
    return asyncio.run(send_request(app, method, path))


def events(reply: Reply) -> list[dict[str, Any]]:
    """The events of a stream before [DONE]."""
    return reply.events


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, **HARMLESS}),
        ("/v1/completions", {**COMPLETION, "best_of": 1, "suffix": "", "top_k": -1}),
        ("/v1/chat/completions", {**CHAT, **HARMLESS, **HARMLESS_IN_CHATS, **OFF, "top_k": -1}),
        ("/v1/chat/completions", {**CHAT, **dict.fromkeys([*HARMLESS, *HARMLESS_IN_CHATS, *OFF])}),
    ],
)
def test_fields_that_do_not_change_the_answer_are_accepted(
    app: ASGIApp, path: str, body: dict[str, Any]
) -> None:
    assert post(app, path, body).status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "alloy"}),
        ("functions", [{"name": "f"}]),
        ("modalities", ["audio"]),
        ("moderation", {"model": "m"}),
        ("prediction", {"type": "content", "content": "a"}),
        ("web_search_options", {}),
        ("frequency_penalty", 0.5),
        ("nonsense", 1),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(
    app: ASGIApp, field: str, value: Any
) -> None:
    reply = post(app, "/v1/chat/completions", {**CHAT, field: value})
    assert reply.status == 400
    assert (reply.error["param"] or "").split("[")[0] == field


@pytest.mark.parametrize("body", [{"best_of": 3}, {"best_of": 2, "n": 3}, {"suffix": "end"}])
def test_a_choice_among_more_answers_and_a_suffix_are_refused(app: ASGIApp, body: dict[str, Any]) -> None:
    reply = post(app, "/v1/completions", {**COMPLETION, **body})
    assert (reply.status, reply.error["param"]) == (400, next(iter(body)))
    assert CompletionRequest(**COMPLETION, best_of=2, n=2).n == 2


def test_history_goes_in_as_the_clients_model_dump_gives_it(app: ASGIApp) -> None:
    answer = json.loads(post(app, "/v1/chat/completions", CHAT).body)["choices"][0]["message"]
    dumped = ChatCompletionMessage(**answer).model_dump()
    assert None in dumped.values()
    turns = [
        {**dumped, "annotations": [], "parsed": {"colour": "blue"}},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "tool_calls": [], "parsed": None, "reasoning_content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    call = {"name": "weather", "arguments": "{}", "parsed_arguments": None}  # of a parsed answer
    turns.append({"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]})
    for turn in turns:
        history = [*CHAT["messages"], turn, {"role": "user", "content": "go on", "name": None}]
        assert post(app, "/v1/chat/completions", {**CHAT, "messages": history}).status == 200, turn


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": "a", "mood": "good"}, "messages[0].mood"),
        ({"role": "user", "content": "who", "name": "ann"}, "messages[0].name"),
    ],
)
def test_a_turn_that_would_be_read_otherwise_is_refused_by_name(
    app: ASGIApp, turn: dict[str, Any], param: str
) -> None:
    reply = post(app, "/v1/chat/completions", {**CHAT, "messages": [turn]})
    assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temperature": True}, "temperature=true: should be a valid number"),
        ({"stop": [None]}, "stop[0]=null: should be a valid string"),
        ({"stream": "yes"}, 'stream="yes": should be a valid boolean'),
        ({"stream_options": [1]}, "stream_options=[1]: should be an object"),
        (
            {"response_format": {"type": 5}},
            'response_format.type=5: should be "text", "json_object" or "json_schema"',
        ),
        ({"messages": "who"}, 'messages="who": should be an array'),
        ({"stop": [""]}, 'stop=[""]: give a list of texts, none of them empty'),
        ({"model": "it's"}, 'model="it\'s": not served here; use tiny, base'),
        (
            {"logit_bias": {"5": 1000}},
            'logit_bias={"5": 1000.0}: give ids from 0 up with numbers from -100 to 100',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'messages[0].content[0].type="image_url": should be one of "text", "refusal"',
        ),
        (
            {"tool_choice": {"type": "tool"}, "tools": []},
            'tool_choice.type="tool": should be "function"',
        ),
        (
            {"response_format": {"type": "json_schema"}},
            'response_format: the type "json_schema" and json_schema do not fit; give both, or neither',
        ),
    ],
)
def test_errors_speak_json(app: ASGIApp, body: dict[str, Any], message: str) -> None:
    assert post(app, "/v1/chat/completions", {**CHAT, **body}).error["message"] == message


def test_a_wrong_setting_of_a_branch_is_named_by_its_path(app: ASGIApp) -> None:
    wrong = {"text": "a", "guided_regex": "a", "guided_choice": ["b"]}
    for branch, path in (
        (wrong, "branches[1]"),
        ({"text": "a", "branches": [wrong]}, "branches[1].branches[0]"),
    ):
        reply = post(app, "/v1/branches", {"model": "tiny", "branches": ["a", branch]})
        assert (reply.status, reply.error["param"]) == (400, f"{path}.guided_regex")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "max_tokens": 4090}, "messages"),
        ("/v1/completions", {**COMPLETION, "prompt": [5] * 4000, "max_tokens": 100}, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": ["a", [5] * 5000]}, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": [5] * 9000}, "prompt"),
    ],
)
def test_a_prompt_beyond_the_context_has_openais_code(
    app: ASGIApp, path: str, body: dict[str, Any], param: str
) -> None:
    reply = post(app, path, body)
    error = reply.error
    assert (reply.status, error["param"], error["code"]) == (400, param, "context_length_exceeded")
    assert error["type"] == "invalid_request_error"
    assert "this model's maximum context length is 4096 tokens" in error["message"]


def test_a_model_is_retrieved_by_its_name(tmp_path: Path) -> None:
    app = ingress_app(tmp_path, served_name="hub/name:7b", adapters={"legal": "somewhere"})
    for path in ("hub/name:7b", "hub%2Fname:7b", "base", "base:legal"):
        reply = asyncio.run(send_request(app, "GET", f"/v1/models/{path.replace('%2F', '/')}"))
        card = json.loads(reply.body)
        assert (reply.status, card["id"], card["object"]) == (200, path.replace("%2F", "/"), "model")
    reply = get(app, "/v1/models/gpt-4")
    assert (reply.status, reply.error["param"], reply.error["code"]) == (404, "model", "model_not_found")


def test_an_unknown_route_names_the_served_ones(app: ASGIApp) -> None:
    for method, path in [("POST", "/v1/embeddings"), ("GET", "/v2"), ("GET", "/web/nothing.js")]:
        reply = get(app, path, method)
        assert (reply.status, reply.error["code"]) == (404, "unknown_route")
        assert reply.error["message"].startswith(f"{method} {path}: no such route; served are ")
        assert "POST /v1/chat/completions" in reply.error["message"]
    reply = get(app, "/v1/completions")
    assert (reply.status, "use POST" in reply.error["message"]) == (405, True)


def test_the_chunks_before_the_usage_have_none(app: ASGIApp) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        options = {"include_usage": True, "include_obfuscation": False}
        *chunks, last = events(post(app, path, {**body, "stream": True, "stream_options": options}))
        assert {chunk["usage"] for chunk in chunks} == {None}
        assert last["usage"]["completion_tokens"] == 1
        assert all("usage" not in chunk for chunk in events(post(app, path, {**body, "stream": True})))


PROMPT = (
    TokenLogprob(5),
    TokenLogprob(6, -1.5, ((7, -0.5), (6, -1.5))),
    TokenLogprob(7, float("-inf"), ((6, -0.25),)),
)
ECHO_STEPS = [
    StepOutput([], [BranchStarted(0, (0, 0))]),
    StepOutput([Event(0, "A", 65, None, -0.5, ((65, -0.5),), prompt=PROMPT)]),
    StepOutput([Event(0, "B", 66, "length", -2.0, ((65, -0.5),))]),
]
SCORED = {"model": "tiny", "prompt": [5, 6, 7], "echo": True, "logprobs": 1}


def test_an_echo_holds_the_prompt_and_its_log_probabilities(tmp_path: Path) -> None:
    ingress = make_ingress(tmp_path, ECHO_STEPS)
    app, decode = ingress.__serve_build_asgi_app__(), ingress.preprocessor.tokenizer.decode
    names = [decode([token]) for token in (5, 6, 7, 65, 66)]
    body = json.loads(post(app, "/v1/completions", SCORED).body)
    (choice,) = body["choices"]
    assert choice["text"] == decode([5, 6, 7]) + "AB"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == names
    assert logprobs["token_logprobs"] == [None, -1.5, -9999.0, -0.5, -2.0]
    assert logprobs["top_logprobs"][:2] == [None, {names[2]: -0.5, names[1]: -1.5}]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    chunks = [
        chunk["choices"][0] for chunk in events(post(app, "/v1/completions", {**SCORED, "stream": True}))
    ]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for name, values in logprobs.items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values


def test_an_echo_without_new_tokens_is_the_prompt_alone(tmp_path: Path) -> None:
    last = Event(0, "A", 65, "length", -0.5, ((65, -0.5),), prompt=PROMPT)
    steps = [ECHO_STEPS[0], StepOutput([last])]
    app = ingress_app(tmp_path, steps)
    for stream in (False, True):
        reply = post(app, "/v1/completions", {**SCORED, "max_tokens": 0, "stream": stream})
        (body,) = events(reply) if stream else [json.loads(reply.body)]
        (choice,) = body["choices"]
        assert (len(choice["text"]), choice["finish_reason"]) == (3, "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -9999.0]
    assert json.loads(post(app, "/v1/completions", {**SCORED, "max_tokens": 0}).body)["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 0,
        "total_tokens": 3,
    }
    assert post(app, "/v1/completions", {**COMPLETION, "max_tokens": 0}).status == 400


def test_an_echo_without_log_probabilities_is_text(app: ASGIApp) -> None:
    (choice,) = json.loads(post(app, "/v1/completions", {**COMPLETION, "echo": True}).body)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("whoA", None)


def test_prompts_that_are_scored_share_nothing(tmp_path: Path) -> None:
    """What is shared is read once, and has one token before each prompt that needs it."""
    preprocessor, prompts = make_ingress(tmp_path).preprocessor, [[*range(5, 40), 50], [*range(5, 40), 60]]
    request = preprocessor.completion(CompletionRequest(**{**SCORED, "prompt": prompts, "n": 2}))
    assert [sample.tokens.split() for sample in request.samples] == [
        [[], prompt, prompt] for prompt in prompts
    ]
    assert request.num_prompt_tokens == 72


def test_only_an_echo_with_log_probabilities_asks_the_engine_for_those_of_the_prompt(tmp_path: Path) -> None:
    preprocessor = make_ingress(tmp_path).preprocessor
    for fields, wanted in [
        ({"echo": True}, None),
        ({"logprobs": 2}, None),
        ({"echo": True, "logprobs": 2}, 2),
    ]:
        request = preprocessor.completion(CompletionRequest(**COMPLETION, **fields))
        assert request.samples[0].params[0].prompt_logprobs == wanted

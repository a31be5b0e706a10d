"""Engine steps as responses, whole and streamed, in OpenAI's format and in that of /v1/branches."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from asgi import Reply, send_request
from tiny import tiny_tokenizer

from parallelmind.engine.output import Event
from parallelmind.engine.request import AddedSegments, Sample, Segment, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize_branches, tokenize_request
from parallelmind.layout import Tokens
from parallelmind.tree import MAIN, Tree
from serving.engine.messages import BranchStarted, EngineRequest, StepOutput
from serving.ingress.streaming import StreamPosition, event_stream
from serving.protocol import branches_response as branches_format
from serving.protocol import openai_response as openai_format
from serving.protocol.branches import BranchesRequest
from serving.protocol.branches_response import BranchCalls
from serving.protocol.errors import EngineLostError, RequestError, overloaded_error
from serving.protocol.openai import new_id

PARAMS = SamplingParams()
TOP = ((65, -0.5), (66, -1.5))


class AsciiTexts:
    """Tokens are the codes of their characters."""

    def token_text(self, token: int) -> str:
        return chr(token)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def text_offsets(self, tokens: Sequence[int]) -> list[int]:
        return list(range(len(tokens)))


COMPLETION = openai_format.CompletionFormatter("cmpl-1", "tiny", AsciiTexts())
CHAT = openai_format.ChatFormatter("chatcmpl-1", "tiny", AsciiTexts())

# Two branches that take turns: one ends by a stop text, whose first letter is held back, the other by its
# length.
STEPS = [
    StepOutput([]),
    StepOutput([Event(0, "A", 65, None, -0.5, TOP), Event(1, "", 195, None, -1.5, TOP)]),
    StepOutput([Event(1, "ü", 188, None, -0.25, TOP), Event(0, "", 66, None, -2.5, TOP)]),
    StepOutput([Event(0, "BC", 67, "stop", -1.0, TOP), Event(1, "D", 68, "length", -2.0, TOP)]),
]
PLAIN = [
    StepOutput(
        [Event(item.branch, item.text, item.token, item.finish_reason) for item in step.events], step.started
    )
    for step in STEPS
]


async def replayed(steps: list[StepOutput], error: Exception | None = None) -> AsyncIterator[StepOutput]:
    for step in steps:
        yield step
    if error:
        raise error


def whole_response(formatter: openai_format.ResponseFormatter, steps: list[StepOutput]) -> dict[str, Any]:
    body = asyncio.run(openai_format.complete_response(formatter, 5, replayed(steps)))
    return json.loads(json.dumps(body, allow_nan=False))  # as it travels


async def _collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def streamed(
    formatter: openai_format.ResponseFormatter,
    steps: list[StepOutput],
    usage: bool = False,
    error: Exception | None = None,
) -> list[dict[str, Any]]:
    """The events before [DONE], as a client reads them from the bytes of the response."""
    chunks = openai_format.response_chunks(formatter, 5, replayed(steps, error), usage)

    async def receive_stream() -> Reply:
        return await send_request(event_stream(chunks, StreamPosition("cmpl-1")), "POST", "/v1/completions")

    reply = asyncio.run(receive_stream())
    *events, end, rest = reply.body.decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    for number, event in enumerate(events, 1):
        is_error = error is not None and number == len(events)
        assert re.fullmatch("data: {.*" if is_error else f"id: cmpl-1:{number}\ndata: {{.*", event)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-store", "no")
    assert "connection" not in reply.headers
    return reply.events


def test_a_completion_holds_every_branch_in_order() -> None:
    body = whole_response(COMPLETION, PLAIN)
    assert (body["id"], body["object"], body["model"]) == ("cmpl-1", "text_completion", "tiny")
    assert body["choices"] == [
        {"index": 0, "text": "ABC", "logprobs": None, "finish_reason": "stop"},
        {"index": 1, "text": "üD", "logprobs": None, "finish_reason": "length"},
    ]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_a_chat_response_is_a_message_of_the_assistant() -> None:
    body = whole_response(CHAT, PLAIN)
    assert (body["object"], body["usage"]["total_tokens"]) == ("chat.completion", 11)
    assert body["choices"][1] == {
        "index": 1,
        "message": {"role": "assistant", "content": "üD", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_logprobs_of_a_completion_hold_tokens_and_text_offsets() -> None:
    logprobs = whole_response(COMPLETION, STEPS)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["A", "B", "C"],
        "token_logprobs": [-0.5, -2.5, -1.0],
        "top_logprobs": [{"A": -0.5, "B": -1.5}] * 3,
        "text_offset": [0, 1, 1],
    }


def test_logprobs_of_a_chat_hold_tokens_their_bytes_and_the_top_tokens() -> None:
    top = [{"token": "A", "logprob": -0.5, "bytes": [65]}, {"token": "B", "logprob": -1.5, "bytes": [66]}]
    logprobs = whole_response(CHAT, STEPS)["choices"][1]["logprobs"]
    assert [(item["logprob"], item["top_logprobs"]) for item in logprobs["content"]] == [
        (-1.5, top),
        (-0.25, top),
        (-2.0, top),
    ]
    assert logprobs["content"][2]["token"] == "D"
    bare = [StepOutput([Event(0, "A", 65, "stop", -0.5)])]
    assert whole_response(CHAT, bare)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("steps", [STEPS, PLAIN])
def test_the_chunks_of_a_stream_add_up_to_the_whole_response(steps: list[StepOutput]) -> None:
    parts = streamed(COMPLETION, steps)
    for expected in whole_response(COMPLETION, steps)["choices"]:
        own = [choice for part in parts for choice in part["choices"] if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in own) == expected["text"]
        assert [choice["finish_reason"] for choice in own][-1] == expected["finish_reason"]
        assert not any(choice["finish_reason"] for choice in own[:-1])
        if expected["logprobs"]:
            for field in ("tokens", "token_logprobs", "top_logprobs"):
                assert [item for choice in own for item in choice["logprobs"][field]] == expected["logprobs"][
                    field
                ]
    assert {(part["id"], part["object"], part["model"]) for part in parts} == {
        ("cmpl-1", "text_completion", "tiny")
    }


def test_a_streamed_token_has_its_text_offset_in_the_branch() -> None:
    offsets = [part["choices"][0]["logprobs"]["text_offset"] for part in streamed(COMPLETION, STEPS)]
    assert offsets == [[0], [0], [0], [1], [1], [1]]


def test_the_role_is_in_the_first_chunk_of_each_branch() -> None:
    choices = [part["choices"][0] for part in streamed(CHAT, PLAIN)]
    assert [(item["index"], item["delta"]) for item in choices] == [
        (0, {"role": "assistant", "content": "A"}),
        (1, {"role": "assistant", "content": "ü"}),
        (0, {"content": "BC"}),
        (1, {"content": "D"}),
    ]
    assert [item["finish_reason"] for item in choices] == [None, None, "stop", "length"]
    assert {part["object"] for part in streamed(CHAT, PLAIN)} == {"chat.completion.chunk"}


@pytest.mark.parametrize("formatter", [COMPLETION, CHAT])
def test_a_stream_ends_with_the_usage_if_it_is_wanted(formatter: openai_format.ResponseFormatter) -> None:
    assert not any("usage" in part for part in streamed(formatter, PLAIN))
    *parts, last = streamed(formatter, PLAIN, usage=True)
    assert [part.pop("usage") for part in parts] == [None] * len(parts)
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], 5, 6)


@pytest.mark.parametrize("formatter", [COMPLETION, CHAT])
def test_a_cancelled_branch_has_openais_finish_reason_stop(
    formatter: openai_format.ResponseFormatter,
) -> None:
    steps = [
        StepOutput([Event(0, "A", 65)]),
        StepOutput([Event(0, "", None, "cancelled"), Event(1, "", None, "cancelled")]),
    ]
    body = whole_response(formatter, steps)
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop"]
    assert body["usage"]["completion_tokens"] == 1
    *parts, last = streamed(formatter, steps, usage=True)
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, "stop", "stop"]
    assert last["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (EngineLostError(), "engine_lost", "server_error"),
        (TimeoutError(), "timeout", "server_error"),
        (overloaded_error(), "overloaded", "rate_limit_error"),
        (ZeroDivisionError("secret"), "internal_error", "server_error"),
    ],
)
def test_a_failure_of_a_stream_is_its_last_event(error: Exception, code: str, kind: str) -> None:
    *parts, last = streamed(CHAT, PLAIN[:2], usage=True, error=error)
    assert [part["choices"][0]["delta"]["content"] for part in parts] == ["A"]
    assert (last["error"]["code"], last["error"]["type"]) == (code, kind)
    assert "secret" not in json.dumps(last)


def test_a_failure_before_the_end_of_a_whole_response_is_raised() -> None:
    for error in (EngineLostError(), overloaded_error()):
        with pytest.raises((EngineLostError, RequestError)):
            asyncio.run(openai_format.complete_response(COMPLETION, 5, replayed(PLAIN, error)))


# A main of three, branches of two and of one; one of four joins, and one of two reads them all.
REQUEST = EngineRequest(
    new_id("smp"),
    "tiny",
    [
        TokenizedRequest(
            Tokens.of_tree([[5, 6, 7], [8, 9], [10], [11, 12]], Tree.flat(2, has_reduce=True)), [PARAMS] * 3
        )
    ],
)
STARTED = [BranchStarted(0, (128, 3)), BranchStarted(1, (256, 3))]
ADDED = AddedSegments(
    TokenizedRequest(Tokens.of_tree([[], [1, 2, 3, 4]], Tree.flat(1)), [PARAMS]), MAIN, False, "a key"
)
BRANCH_STEPS = [
    StepOutput([], STARTED),
    StepOutput([Event(0, "A", 65, pos2d=(128, 5)), Event(1, "B", 66, "stop", -0.5, TOP, pos2d=(256, 4))]),
    StepOutput([Event(0, "a", 97, "length", pos2d=(128, 6))], [BranchStarted(3, (512, 6))], [ADDED]),
    StepOutput([Event(3, "C", 67, pos2d=(512, 10)), Event(3, "", None, "cancelled", pos2d=(512, 6))]),
    StepOutput([Event(2, "D", 68, pos2d=(0, 13)), Event(2, "E", 69, "stop", pos2d=(0, 14))]),
]
USAGE = {"prompt_tokens": 3 + 2 + 1 + 4 + 2, "completion_tokens": 6, "total_tokens": 18}


def no_calls() -> BranchCalls:
    """For a request without tools."""
    return BranchCalls("smp-1", BranchesRequest(model="tiny", branches=["who"]))


def branches_whole(steps: list[StepOutput]) -> dict[str, Any]:
    return asyncio.run(branches_format.branches_response(REQUEST, replayed(steps), no_calls()))


def branches_streamed(steps: list[StepOutput]) -> list[dict[str, Any]]:
    return asyncio.run(_collect(branches_format.branches_chunks(REQUEST, replayed(steps), no_calls())))


def test_a_branches_response_holds_coordinates_tokens_added_and_reduce_branches() -> None:
    body = branches_whole(BRANCH_STEPS)
    assert (body["id"], body["object"], body["model"], body["usage"]) == (
        REQUEST.id,
        "branches",
        "tiny",
        USAGE,
    )
    outputs = [
        (item["text"], item["tokens"], item["finish_reason"], item["branch"], item["time"])
        for item in (*body["branches"], body["reduce"])
    ]
    assert outputs == [
        ("Aa", [65, 97], "length", 128, 3),
        ("B", [66], "stop", 256, 3),
        ("C", [67], "cancelled", 512, 6),
        ("DE", [68, 69], "stop", 0, 11),
    ]
    assert [(item["index"], item["path"]) for item in (*body["branches"], body["reduce"])] == [
        (0, "branches[0]"),
        (1, "branches[1]"),
        (3, "branches[2]"),
        (2, "reduce"),
    ]
    assert [item["logprobs"] for item in body["branches"]] == [None, [-0.5], None]
    assert body["branches"][1]["top"] == [list(TOP)]


def test_a_stream_of_branches_announces_each_branch_before_its_tokens() -> None:
    parts = branches_streamed(BRANCH_STEPS)
    kinds = "begun step joined step step joined step done"
    assert [part["object"] for part in parts] == [f"branches.{kind}" for kind in kinds.split()]
    assert {part["id"] for part in parts} == {REQUEST.id}
    starts = [start for part in parts for start in part.get("branches", [])]
    assert starts == [
        {"index": 0, "path": "branches[0]", "prompt_tokens": 2, "branch": 128, "time": 3},
        {"index": 1, "path": "branches[1]", "prompt_tokens": 1, "branch": 256, "time": 3},
        {"index": 3, "path": "branches[2]", "prompt_tokens": 4, "branch": 512, "time": 6},
        {"index": 2, "path": "reduce", "prompt_tokens": 2, "branch": 0, "time": 11},
    ]
    deltas = [delta for part in parts for delta in part.get("deltas", [])]
    assert [
        (item["index"], item["text"], item["token"], item["branch"], item["time"]) for item in deltas
    ] == [
        (event.branch, event.text, event.token, *((event.token and event.pos2d) or (None, None)))
        for step in BRANCH_STEPS
        for event in step.events
    ]
    assert [item["finish_reason"] for item in deltas] == [
        None,
        "stop",
        "length",
        None,
        "cancelled",
        None,
        "stop",
    ]
    assert parts[-1]["usage"] == USAGE


def test_steps_that_arrive_together_give_the_same_response() -> None:
    together = [
        StepOutput(
            [event for step in BRANCH_STEPS for event in step.events],
            [branch for step in BRANCH_STEPS for branch in step.started],
            [added for step in BRANCH_STEPS for added in step.added],
        )
    ]
    assert branches_whole(together)["branches"] == branches_whole(BRANCH_STEPS)["branches"]
    assert branches_streamed(together)[-1] == branches_streamed(BRANCH_STEPS)[-1]


def test_a_reduce_that_is_cancelled_before_it_starts_has_no_coordinates() -> None:
    steps = [*BRANCH_STEPS[:-1], StepOutput([Event(2, "", None, "cancelled")])]
    *_, step, done = branches_streamed(steps)
    assert [(item["path"], item["finish_reason"], item["time"]) for item in step["deltas"]] == [
        ("reduce", "cancelled", None)
    ]
    assert done["usage"]["prompt_tokens"] == USAGE["prompt_tokens"] - 2
    reduce = branches_whole(steps)["reduce"]
    assert (reduce["finish_reason"], reduce["text"], reduce["branch"]) == ("cancelled", "", None)


# Branch 0 holds two branches and a reduce; while it runs, it is forked once more, with a branch below that.
TREE_REQUEST = EngineRequest(
    "smp-2",
    "tiny",
    [
        tokenize_request(
            tiny_tokenizer(),
            Sample([5], [Segment([6], [[7], [8]], reduce=[9]), [10]], reduce=[11]),
            None,
            None,
            {},
        )
    ],
)
FORK = AddedSegments(tokenize_branches(tiny_tokenizer(), [Segment([12], [[13]])], {}), 1, False, "a key")
TREE_STEPS = [
    StepOutput([], [BranchStarted(0, (1, 1)), BranchStarted(4, (5, 1))]),
    StepOutput([Event(0, "A", 65, pos2d=(1, 2)), Event(4, "B", 66, "stop", pos2d=(5, 2))]),
    StepOutput(
        [Event(0, "", None, "forked", pos2d=(1, 1)), Event(1, "", None, "length", pos2d=(2, 3))],
        [BranchStarted(6, (7, 3))],
        [FORK],
    ),
    StepOutput([Event(2, "C", 67, "stop", pos2d=(3, 4)), Event(6, "D", 68, "stop", pos2d=(7, 4))]),
    StepOutput([Event(7, "E", 69, "stop", pos2d=(8, 6)), Event(3, "F", 70, "stop", pos2d=(1, 8))]),
    StepOutput([Event(5, "G", 71, "stop", pos2d=(0, 10))]),
]


def texts_of(output: dict[str, Any]) -> Any:
    """Path, text, and those of what follows."""
    below = [*output["branches"], *([output["reduce"]] if output["reduce"] else [])]
    return (output.get("path"), output.get("text"), *(texts_of(item) for item in below))


def test_a_response_is_the_tree_of_the_sample() -> None:
    body = asyncio.run(branches_format.branches_response(TREE_REQUEST, replayed(TREE_STEPS), no_calls()))
    first = (
        "branches[0]",
        "A",
        ("branches[0].branches[0]", ""),
        ("branches[0].branches[1]", "C"),
        ("branches[0].branches[2]", "D", ("branches[0].branches[2].branches[0]", "E")),
        ("branches[0].reduce", "F"),
    )
    assert texts_of(body) == (None, None, first, ("branches[1]", "B"), ("reduce", "G"))
    assert body["branches"][0]["finish_reason"] == "forked"
    assert body["usage"]["prompt_tokens"] == 1 + 6 + 2


def test_a_stream_names_every_segment_by_its_path_and_announces_it_once() -> None:
    parts = asyncio.run(
        _collect(branches_format.branches_chunks(TREE_REQUEST, replayed(TREE_STEPS), no_calls()))
    )
    starts = [(start["index"], start["time"]) for part in parts for start in part.get("branches", [])]
    assert starts == [(0, 1), (4, 1), (6, 3), (1, 3), (2, 3), (7, 5), (3, 7), (5, 9)]
    deltas = [delta for part in parts for delta in part.get("deltas", [])]
    assert deltas[-3]["path"] == "branches[0].branches[2].branches[0]"
    assert [delta["path"] for delta in deltas[-2:]] == ["branches[0].reduce", "reduce"]

"""Steps of an engine as OpenAI's clients read them, whole and streamed; and as /v1/branches tells them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from parallelmind.engine.output import Event
from parallelmind.engine.request import ReduceSpec, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.layout import Tokens
from serving.engine.messages import BranchStarted, EngineRequest, StepOutput
from serving.protocol import branch_response as branch_answer
from serving.protocol import response as answer
from serving.protocol.errors import EngineLostError, RequestError, busy
from serving.protocol.openai import fresh_id

PARAMS = SamplingParams()
LIKELY = ((65, -0.5), (66, -1.5))
COMPLETION = answer.CompletionFormatter("cmpl-1", "tiny", chr)
CHAT = answer.ChatFormatter("chatcmpl-1", "tiny", chr, lambda token: bytes([token]))

# Two branches that take turns: one ends by a stop text, whose first letter is held back, the other by its
# length.
STEPS = [
    StepOutput([], []),
    StepOutput([Event(0, "A", 65, None, -0.5, LIKELY), Event(1, "", 195, None, -1.5, LIKELY)], []),
    StepOutput([Event(1, "ü", 188, None, -0.25, LIKELY), Event(0, "", 66, None, -2.5, LIKELY)], []),
    StepOutput([Event(0, "BC", 67, "stop", -1.0, LIKELY), Event(1, "D", 68, "length", -2.0, LIKELY)], []),
]
PLAIN = [
    StepOutput(
        [Event(each.branch, each.text, each.token, each.finish_reason) for each in step.events], step.begun
    )
    for step in STEPS
]


async def played(steps: list[StepOutput], error: Exception | None = None) -> AsyncIterator[StepOutput]:
    for step in steps:
        yield step
    if error:
        raise error


def whole(shape: answer.ResponseFormatter, steps: list[StepOutput]) -> dict[str, Any]:
    body = asyncio.run(answer.whole(shape, 5, played(steps)))
    return json.loads(json.dumps(body, allow_nan=False))  # as it travels


async def _listed(bodies: AsyncIterator[Any]) -> list[Any]:
    return [body async for body in bodies]


def streamed(
    shape: answer.ResponseFormatter,
    steps: list[StepOutput],
    usage: bool = False,
    error: Exception | None = None,
) -> list[dict[str, Any]]:
    """What a client reads, by its own rules, up to [DONE]."""
    text = "".join(
        asyncio.run(_listed(answer.server_sent(answer.parts(shape, 5, played(steps, error), usage))))
    )
    *events, end, rest = text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_holds_every_branch_in_order() -> None:
    body = whole(COMPLETION, PLAIN)
    assert (body["id"], body["object"], body["model"]) == ("cmpl-1", "text_completion", "tiny")
    assert body["choices"] == [
        {"index": 0, "text": "ABC", "logprobs": None, "finish_reason": "stop"},
        {"index": 1, "text": "üD", "logprobs": None, "finish_reason": "length"},
    ]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_a_chat_answer_is_the_assistants() -> None:
    body = whole(CHAT, PLAIN)
    assert (body["object"], body["usage"]["total_tokens"]) == ("chat.completion", 11)
    assert body["choices"][1] == {
        "index": 1,
        "message": {"role": "assistant", "content": "üD", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_logprobs_of_a_completion_tell_tokens_and_where_their_text_begins() -> None:
    found = whole(COMPLETION, STEPS)["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["A", "B", "C"],
        "token_logprobs": [-0.5, -2.5, -1.0],
        "top_logprobs": [{"A": -0.5, "B": -1.5}] * 3,
        "text_offset": [0, 1, 1],
    }


def test_logprobs_of_a_chat_tell_each_token_its_bytes_and_the_likeliest() -> None:
    top = [{"token": "A", "logprob": -0.5, "bytes": [65]}, {"token": "B", "logprob": -1.5, "bytes": [66]}]
    found = whole(CHAT, STEPS)["choices"][1]["logprobs"]
    assert [(each["logprob"], each["top_logprobs"]) for each in found["content"]] == [
        (-1.5, top),
        (-0.25, top),
        (-2.0, top),
    ]
    assert found["content"][2]["token"] == "D"
    bare = [StepOutput([Event(0, "A", 65, "stop", -0.5)], [])]
    assert whole(CHAT, bare)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("steps", [STEPS, PLAIN])
def test_the_parts_of_a_stream_make_up_the_whole(steps: list[StepOutput]) -> None:
    parts = streamed(COMPLETION, steps)
    for expected in whole(COMPLETION, steps)["choices"]:
        own = [choice for part in parts for choice in part["choices"] if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in own) == expected["text"]
        assert [choice["finish_reason"] for choice in own][-1] == expected["finish_reason"]
        assert not any(choice["finish_reason"] for choice in own[:-1])
        if expected["logprobs"]:
            for field in ("tokens", "token_logprobs", "top_logprobs"):
                assert [each for choice in own for each in choice["logprobs"][field]] == expected["logprobs"][
                    field
                ]
    assert {(part["id"], part["object"], part["model"]) for part in parts} == {
        ("cmpl-1", "text_completion", "tiny")
    }


def test_a_streamed_token_tells_where_its_text_begins_in_the_whole() -> None:
    offsets = [part["choices"][0]["logprobs"]["text_offset"] for part in streamed(COMPLETION, STEPS)]
    assert offsets == [[0], [0], [0], [1], [1], [1]]


def test_the_first_part_of_each_branch_alone_says_the_role() -> None:
    choices = [part["choices"][0] for part in streamed(CHAT, PLAIN)]
    assert [(each["index"], each["delta"]) for each in choices] == [
        (0, {"role": "assistant", "content": "A"}),
        (1, {"role": "assistant", "content": "ü"}),
        (0, {"content": "BC"}),
        (1, {"content": "D"}),
    ]
    assert [each["finish_reason"] for each in choices] == [None, None, "stop", "length"]
    assert {part["object"] for part in streamed(CHAT, PLAIN)} == {"chat.completion.chunk"}


@pytest.mark.parametrize("shape", [COMPLETION, CHAT])
def test_a_stream_ends_with_the_usage_if_that_is_wanted(shape: answer.ResponseFormatter) -> None:
    assert not any("usage" in part for part in streamed(shape, PLAIN))
    *parts, last = streamed(shape, PLAIN, usage=True)
    assert not any("usage" in part for part in parts)
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], 5, 6)


@pytest.mark.parametrize("shape", [COMPLETION, CHAT])
def test_a_cancelled_branch_has_stopped_as_far_as_openai_knows(shape: answer.ResponseFormatter) -> None:
    steps = [
        StepOutput([Event(0, "A", 65)], []),
        StepOutput([Event(0, "", None, "cancelled"), Event(1, "", None, "cancelled")], []),
    ]
    body = whole(shape, steps)
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop"]
    assert body["usage"]["completion_tokens"] == 1
    *parts, last = streamed(shape, steps, usage=True)
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, "stop", "stop"]
    assert last["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (EngineLostError(), "engine_lost", "server_error"),
        (TimeoutError(), "timeout", "server_error"),
        (busy(), "overloaded", "rate_limit_error"),
        (ZeroDivisionError("secret"), "internal_error", "server_error"),
    ],
)
def test_a_failure_midway_is_the_last_event(error: Exception, code: str, kind: str) -> None:
    *parts, last = streamed(CHAT, PLAIN[:2], usage=True, error=error)
    assert [part["choices"][0]["delta"]["content"] for part in parts] == ["A"]
    assert (last["error"]["code"], last["error"]["type"]) == (code, kind)
    assert "secret" not in json.dumps(last)


def test_a_failure_before_the_end_of_a_whole_answer_is_raised() -> None:
    for error in (EngineLostError(), busy()):
        with pytest.raises((EngineLostError, RequestError)):
            asyncio.run(answer.whole(COMPLETION, 5, played(PLAIN, error)))


# A main of three, branches of two and of one; one of four joins, and one of two reads them all.
WORK = EngineRequest(
    fresh_id("smp"),
    "tiny",
    TokenizedRequest(Tokens.of([5, 6, 7], [[8, 9], [10]]), [PARAMS] * 2, ReduceSpec([11, 12], PARAMS)),
)
BEGUN = [BranchStarted(0, [8, 9], PARAMS, (128, 3)), BranchStarted(1, [10], PARAMS, (256, 3))]
LATE = BranchStarted(2, [1, 2, 3, 4], PARAMS, (384, 6))
TOLD = [
    StepOutput([], BEGUN),
    StepOutput(
        [Event(0, "A", 65, pos2d=(128, 5)), Event(1, "B", 66, "stop", -0.5, LIKELY, pos2d=(256, 4))], []
    ),
    StepOutput([Event(0, "a", 97, "length", pos2d=(128, 6))], [LATE]),
    StepOutput([Event(2, "C", 67, pos2d=(384, 10)), Event(2, "", None, "cancelled")], []),
    StepOutput([Event(3, "D", 68, pos2d=(512, 13)), Event(3, "E", 69, "stop", pos2d=(512, 14))], []),
]
USAGE = {"prompt_tokens": 3 + 2 + 1 + 4 + 2, "completion_tokens": 6, "total_tokens": 18}


def branches_whole(steps: list[StepOutput]) -> dict[str, Any]:
    return asyncio.run(branch_answer.whole(WORK, played(steps)))


def branches_streamed(steps: list[StepOutput]) -> list[dict[str, Any]]:
    return asyncio.run(_listed(branch_answer.parts(WORK, played(steps))))


def test_branches_tell_their_places_tokens_and_what_joined_and_followed() -> None:
    body = branches_whole(TOLD)
    assert (body["id"], body["object"], body["model"], body["usage"]) == (WORK.id, "branches", "tiny", USAGE)
    told = [
        (each["text"], each["tokens"], each["finish_reason"], each["branch"], each["time"])
        for each in body["branches"]
    ]
    assert told == [
        ("Aa", [65, 97], "length", 128, 3),
        ("B", [66], "stop", 256, 3),
        ("C", [67], "cancelled", 384, 6),
        ("DE", [68, 69], "stop", 512, 11),
    ]
    assert [each["index"] for each in body["branches"]] == [0, 1, 2, 3]
    assert [each["logprobs"] for each in body["branches"]] == [None, [-0.5], None, None]
    assert body["branches"][1]["top"] == [list(LIKELY)]


def test_a_stream_of_branches_tells_each_beginning_before_its_words() -> None:
    parts = branches_streamed(TOLD)
    kinds = "begun step joined step step joined step done"
    assert [part["object"] for part in parts] == [f"branches.{kind}" for kind in kinds.split()]
    assert {part["id"] for part in parts} == {WORK.id}
    places = [place for part in parts for place in part.get("branches", [])]
    assert places == [
        {"index": 0, "prompt_tokens": 2, "branch": 128, "time": 3},
        {"index": 1, "prompt_tokens": 1, "branch": 256, "time": 3},
        {"index": 2, "prompt_tokens": 4, "branch": 384, "time": 6},
        {"index": 3, "prompt_tokens": 2, "branch": 512, "time": 11},
    ]
    deltas = [delta for part in parts for delta in part.get("deltas", [])]
    assert [
        (each["index"], each["text"], each["token"], each["branch"], each["time"]) for each in deltas
    ] == [
        (event.branch, event.text, event.token, *(event.pos2d or (None, None)))
        for step in TOLD
        for event in step.events
    ]
    assert [each["finish_reason"] for each in deltas] == [
        None,
        "stop",
        "length",
        None,
        "cancelled",
        None,
        "stop",
    ]
    assert parts[-1]["usage"] == USAGE


def test_what_comes_late_and_all_at_once_says_the_same() -> None:
    together = [
        StepOutput(
            [event for step in TOLD for event in step.events],
            [begun for step in TOLD for begun in step.begun],
        )
    ]
    assert branches_whole(together)["branches"] == branches_whole(TOLD)["branches"]
    assert branches_streamed(together)[-1] == branches_streamed(TOLD)[-1]


def test_one_who_reads_all_others_and_is_cancelled_before_a_word_has_said_nothing() -> None:
    steps = [*TOLD[:-1], StepOutput([Event(3, "", None, "cancelled")], [])]
    deltas = [delta for event in branches_streamed(steps) for delta in event.get("deltas", [])]
    assert {delta["index"] for delta in deltas} == {0, 1, 2}
    assert [each["finish_reason"] for each in branches_whole(steps)["branches"]] == [
        "length",
        "stop",
        "cancelled",
    ]

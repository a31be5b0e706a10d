"""Steps of an engine as an answer in OpenAI's shapes: in one piece, or as server-sent events while they
come.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from pydantic import BaseModel

import parallelmind as pm
from serving.engine.messages import StepOutput
from serving.observability.log import log
from serving.protocol.errors import FAILED, problem_of
from serving.protocol.openai import ErrorBody, Usage

Json = dict[str, Any]
Spell = Callable[[int], str]  # the text of one token
Encoded = Callable[[int], bytes | None]  # and its bytes, which need not be whole characters


class ResponseFormatter(Protocol):
    """How one interface words its answers."""

    def whole(self, number: int, events: Sequence[pm.Event]) -> Json:
        """One branch, all of it."""

    def part(self, event: pm.Event, told: int | None) -> Json:
        """What a token adds to a branch; told: characters of it so far, None if it is the branch's first."""

    def envelope(self, choices: list[Json], usage: Usage | None, streamed: bool) -> Json: ...


def _text(events: Sequence[pm.Event]) -> str:
    return "".join(event.text for event in events)


def _reason(event: pm.Event) -> str | None:
    return "stop" if event.finish_reason == "cancelled" else event.finish_reason


def _spoken(events: Sequence[pm.Event]) -> list[pm.Event]:
    return [event for event in events if event.logprob is not None and event.token is not None]


class CompletionFormatter:
    """/v1/completions."""

    def __init__(self, id: str, model: str, spell: Spell) -> None:
        self._head = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._spell = spell

    def whole(self, number: int, events: Sequence[pm.Event]) -> Json:
        return self._choice(number, events, 0)

    def part(self, event: pm.Event, told: int | None) -> Json:
        return self._choice(event.branch, [event], told or 0)

    def envelope(self, choices: list[Json], usage: Usage | None, streamed: bool) -> Json:
        return {**self._head, "choices": choices, **({"usage": usage.model_dump()} if usage else {})}

    def _choice(self, number: int, events: Sequence[pm.Event], at: int) -> Json:
        logprobs, reason = self._logprobs(_spoken(events), at), _reason(events[-1])
        return {"index": number, "text": _text(events), "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, events: list[pm.Event], at: int) -> Json | None:
        """at: where the first of them begins in the branch's text."""
        if not events:
            return None
        offsets = []
        for event in events:
            offsets.append(at)
            at += len(event.text)
        return {
            "tokens": [self._spell(event.token or 0) for event in events],
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [{self._spell(token): value for token, value in event.top} for event in events],
            "text_offset": offsets,
        }


class ChatFormatter:
    """/v1/chat/completions."""

    def __init__(self, id: str, model: str, spell: Spell, encoded: Encoded) -> None:
        self._head = {"id": id, "created": int(time.time()), "model": model}
        self._spell, self._encoded = spell, encoded

    def whole(self, number: int, events: Sequence[pm.Event]) -> Json:
        message = {"role": "assistant", "content": _text(events), "refusal": None}
        return {"index": number, "message": message, **self._rest(events, _reason(events[-1]))}

    def part(self, event: pm.Event, told: int | None) -> Json:
        delta = {**({"role": "assistant"} if told is None else {}), "content": event.text}
        return {"index": event.branch, "delta": delta, **self._rest([event], _reason(event))}

    def envelope(self, choices: list[Json], usage: Usage | None, streamed: bool) -> Json:
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {
            **self._head,
            "object": kind,
            "choices": choices,
            **({"usage": usage.model_dump()} if usage else {}),
        }

    def _rest(self, events: Sequence[pm.Event], reason: str | None) -> Json:
        spoken = _spoken(events)
        content = [
            {**self._token(event.token or 0, event.logprob), "top_logprobs": self._top(event)}
            for event in spoken
        ]
        return {
            "logprobs": {"content": content, "refusal": None} if spoken else None,
            "finish_reason": reason,
        }

    def _top(self, event: pm.Event) -> list[Json]:
        return [self._token(token, value) for token, value in event.top]

    def _token(self, token: int, logprob: float | None) -> Json:
        raw = self._encoded(token)
        return {"token": self._spell(token), "logprob": logprob, "bytes": None if raw is None else list(raw)}


async def whole(shape: ResponseFormatter, prompt_tokens: int, steps: AsyncIterator[StepOutput]) -> Json:
    """Every branch's text, once all have ended."""
    told: dict[int, list[pm.Event]] = {}
    async for step in steps:
        for event in step.events:
            told.setdefault(event.branch, []).append(event)
    written = sum(event.token is not None for events in told.values() for event in events)
    choices = [shape.whole(number, told[number]) for number in sorted(told)]
    return shape.envelope(choices, Usage.of(prompt_tokens, written), streamed=False)


async def parts(
    shape: ResponseFormatter, prompt_tokens: int, steps: AsyncIterator[StepOutput], wants_usage: bool
) -> AsyncIterator[Json]:
    """One part per branch and step that has something to show."""
    told: dict[int, int] = {}
    written = 0
    async for step in steps:
        for event in step.events:
            written += event.token is not None
            if event.text or event.finish_reason or event.logprob is not None:
                yield shape.envelope([shape.part(event, told.get(event.branch))], None, streamed=True)
                told[event.branch] = told.get(event.branch, 0) + len(event.text)
    if wants_usage:
        yield shape.envelope([], Usage.of(prompt_tokens, written), streamed=True)


async def server_sent(bodies: AsyncIterator[Json]) -> AsyncIterator[str]:
    """A failure midway is an event as well, since the status is out; a stream without [DONE] at its end was
    cut off.
    """
    try:
        async for body in bodies:
            yield event_of(body)
    except Exception as error:
        problem = problem_of(error)
        if problem is FAILED:
            log.exception("a stream failed midway")
        yield event_of(ErrorBody(error=problem))
    yield "data: [DONE]\n\n"


def event_of(body: Json | BaseModel) -> str:
    text = (
        body.model_dump_json()
        if isinstance(body, BaseModel)
        else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    )
    return f"data: {text}\n\n"

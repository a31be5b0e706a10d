"""Engine steps as OpenAI's responses, whole or as the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import Any, Protocol

import parallelmind as pm
from parallelmind.engine.linear import Linearizer
from parallelmind.engine.output import TokenLogprob
from serving.engine.messages import StepOutput
from serving.protocol.errors import decoding_error
from serving.protocol.openai import Usage

Json = dict[str, Any]

EXCLUDED_LOGPROB = -9999.0  # of a token with the probability 0, since JSON has no infinity


class TokenTexts(Protocol):
    """How tokens are written in log-probabilities."""

    def token_text(self, token: int) -> str: ...

    def prompt_text(self, prompt: str | list[int]) -> str: ...

    def token_bytes(self, token: int) -> bytes | None: ...

    def text_offsets(self, tokens: Sequence[int]) -> list[int]:
        """Where the text of each token begins in that of all."""


class ResponseFormatter(Protocol):
    """The response format of one route."""

    def choice(self, index: int, events: Sequence[pm.Event]) -> Json:
        """The whole output of one branch."""

    def delta(self, event: pm.Event, text_offset: int | None) -> Json:
        """What one token adds to a branch.

        text_offset: characters of the branch before it; None for the first chunk of the branch.
        """

    def envelope(self, choices: list[Json], usage: Usage | None, streamed: bool) -> Json:
        """The response around choices or deltas."""


class CompletionFormatter:
    """Format of /v1/completions."""

    def __init__(
        self, id: str, model: str, texts: TokenTexts, echoed: Sequence[str | list[int]] = (), n: int = 1
    ) -> None:
        """echoed: the prompts, if they are part of the answers. n: answers to each of them."""
        self._head = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._texts, self._echoed, self._n = texts, echoed, n
        self._prompt_text = cache(lambda number: texts.prompt_text(echoed[number]))

    def choice(self, index: int, events: Sequence[pm.Event]) -> Json:
        return self._choice(index, events, None)

    def delta(self, event: pm.Event, text_offset: int | None) -> Json:
        return self._choice(event.branch, [event], text_offset)

    def envelope(self, choices: list[Json], usage: Usage | None, streamed: bool) -> Json:
        return {**self._head, "choices": choices, **_usage_field(usage)}

    def _choice(self, index: int, events: Sequence[pm.Event], text_offset: int | None) -> Json:
        """text_offset: characters of the branch before the events; None: nothing is returned yet."""
        echo = self._prompt_text(index // self._n) if self._echoed else ""
        return {
            "index": index,
            "text": (echo if text_offset is None else "") + _joined_text(events),
            "logprobs": self._logprobs(events, len(echo) + (text_offset or 0)),
            "finish_reason": _finish_reason(events[-1]),
        }

    def _logprobs(self, events: Sequence[pm.Event], text_offset: int) -> Json | None:
        """Log-probabilities of the prompt and of the events. text_offset: start of the first event's text."""
        if not events[0].prompt and all(event.logprob is None for event in events):
            return None
        tokens = [*events[0].prompt]
        offsets = self._texts.text_offsets([token.token for token in tokens])
        for event in _with_logprobs(events):
            offsets.append(text_offset)
            tokens.append(TokenLogprob(event.token or 0, event.logprob, event.top))
            text_offset += len(event.text)
        if not tokens:
            return None
        text_of = self._texts.token_text
        return {
            "tokens": [text_of(token.token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else {text_of(other): value for other, value in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }


class ChatFormatter:
    """Format of /v1/chat/completions."""

    def __init__(self, id: str, model: str, texts: TokenTexts) -> None:
        self._head = {"id": id, "created": int(time.time()), "model": model}
        self._texts = texts

    def choice(self, index: int, events: Sequence[pm.Event]) -> Json:
        message = {"role": "assistant", "content": _joined_text(events), "refusal": None}
        return {"index": index, "message": message, **self._logprobs_and_reason(events)}

    def delta(self, event: pm.Event, text_offset: int | None) -> Json:
        delta = {**({"role": "assistant"} if text_offset is None else {}), "content": event.text}
        return {"index": event.branch, "delta": delta, **self._logprobs_and_reason([event])}

    def envelope(self, choices: list[Json], usage: Usage | None, streamed: bool) -> Json:
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {**self._head, "object": kind, "choices": choices, **_usage_field(usage)}

    def _logprobs_and_reason(self, events: Sequence[pm.Event]) -> Json:
        content = token_logprobs(self._texts, events)
        return {
            "logprobs": {"content": content, "refusal": None} if content else None,
            "finish_reason": _finish_reason(events[-1]),
        }


def token_logprobs(texts: TokenTexts, events: Sequence[pm.Event]) -> list[Json]:
    """The tokens of the events with their log-probabilities, for those that have one."""
    return [
        {
            **_token(texts, event.token or 0, event.logprob),
            "top_logprobs": [_token(texts, token, value) for token, value in event.top],
        }
        for event in _with_logprobs(events)
    ]


def _token(texts: TokenTexts, token: int, logprob: float | None) -> Json:
    raw = texts.token_bytes(token)
    return {
        "token": texts.token_text(token),
        "logprob": logprob,
        "bytes": None if raw is None else list(raw),
    }


def _finite(logprob: float | None) -> float | None:
    """The log-probability in JSON, as OpenAI writes it."""
    return None if logprob is None else max(logprob, EXCLUDED_LOGPROB)


def _joined_text(events: Sequence[pm.Event]) -> str:
    return "".join(event.text for event in events)


def _finish_reason(event: pm.Event) -> str | None:
    """Finish reason in OpenAI's format, which has none for a cancelled branch."""
    return "stop" if event.finish_reason == "cancelled" else event.finish_reason


def raise_error(event: pm.Event) -> None:
    """Raise RequestError if a choice ended with an error, for which OpenAI's format has no finish reason."""
    if event.error is not None:
        raise decoding_error(f"choices[{event.branch}]: {event.error}")


def _with_logprobs(events: Sequence[pm.Event]) -> list[pm.Event]:
    return [event for event in events if event.logprob is not None and event.token is not None]


def _usage_field(usage: Usage | None) -> Json:
    return {"usage": usage.model_dump()} if usage else {}


async def prompts_only(steps: AsyncIterator[StepOutput]) -> AsyncIterator[StepOutput]:
    """The steps without the tokens that were decoded, each of which ends its branch."""
    async for step in steps:
        events = [
            event if event.error else pm.Event(event.branch, "", None, "length", prompt=event.prompt)
            for event in step.events
        ]
        yield step._replace(events=events)


async def linear(steps: AsyncIterator[StepOutput]) -> AsyncIterator[StepOutput]:
    """The steps of answers that fork by themselves, as those of ordinary answers."""
    linearizer = Linearizer()
    async for step in steps:
        # An engine that resumes the request numbers its sample anew.
        events = [event._replace(sample=0) for event in step.events]
        yield step._replace(events=[shown for event in events for shown in linearizer.push(event)])


async def complete_response(
    formatter: ResponseFormatter, prompt_tokens: int, steps: AsyncIterator[StepOutput]
) -> Json:
    """The response with every branch, once all have ended."""
    events: dict[int, list[pm.Event]] = {}
    async for step in steps:
        for event in step.events:
            raise_error(event)
            events.setdefault(event.branch, []).append(event)
    completion_tokens = sum(event.token is not None for branch in events.values() for event in branch)
    choices = [formatter.choice(branch, events[branch]) for branch in sorted(events)]
    return formatter.envelope(choices, Usage.of(prompt_tokens, completion_tokens), streamed=False)


async def response_chunks(
    formatter: ResponseFormatter, prompt_tokens: int, steps: AsyncIterator[StepOutput], wants_usage: bool
) -> AsyncIterator[Json]:
    """One chunk for every branch and step with something to show, and the usage if it is wanted."""
    text_lengths: dict[int, int] = {}
    completion_tokens = 0
    async for step in steps:
        for event in step.events:
            raise_error(event)
            completion_tokens += event.token is not None
            if event.text or event.finish_reason or event.logprob is not None:
                delta = formatter.delta(event, text_lengths.get(event.branch))
                chunk = formatter.envelope([delta], None, streamed=True)
                yield {**chunk, "usage": None} if wants_usage else chunk
                text_lengths[event.branch] = text_lengths.get(event.branch, 0) + len(event.text)
    if wants_usage:
        yield formatter.envelope([], Usage.of(prompt_tokens, completion_tokens), streamed=True)

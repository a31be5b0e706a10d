"""Engine steps as OpenAI's response objects, whole or as the events of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from itertools import count

import parallelmind as pm
from serving.engine.messages import StepOutput
from serving.protocol.openai import new_id
from serving.protocol.openai_response import Json, TokenTexts, raise_error, token_logprobs
from serving.protocol.responses import ResponsesRequest


class ResponsesFormatter:
    """Format of /v1/responses: one message with one text.

    id: of the response. prompt_tokens: of the conversation.
    """

    def __init__(self, id: str, body: ResponsesRequest, prompt_tokens: int, texts: TokenTexts) -> None:
        self._id, self._body, self._prompt_tokens, self._texts = id, body, prompt_tokens, texts
        self._created_at, self._item_id = int(time.time()), new_id("msg")
        self._events: list[pm.Event] = []

    def add(self, event: pm.Event) -> None:
        """Append what one token adds. Raises RequestError if the answer ended with an error."""
        raise_error(event)
        self._events.append(event)

    def response(self) -> Json:
        """The response as it is now."""
        body, status = self._body, self._status()
        is_cut = status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [self._item()] if status != "in_progress" else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if status != "in_progress" else None,
            "user": body.user,
        }

    def opening(self) -> Iterator[Json]:
        """The events before the text."""
        yield {"type": "response.created", "response": self.response()}
        yield {"type": "response.in_progress", "response": self.response()}
        yield {"type": "response.output_item.added", "output_index": 0, "item": self._item(is_empty=True)}
        yield {"type": "response.content_part.added", **self._place(), "part": _text_part("", [])}

    def delta(self, event: pm.Event) -> Json:
        """The event of new text."""
        logprobs = token_logprobs(self._texts, [event])
        return {
            "type": "response.output_text.delta",
            **self._place(),
            "delta": event.text,
            "logprobs": logprobs,
        }

    def closing(self) -> Iterator[Json]:
        """The events after the text."""
        part = self._part()
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield {"type": "response.output_text.done", **self._place(), **text}
        yield {"type": "response.content_part.done", **self._place(), "part": part}
        yield {"type": "response.output_item.done", "output_index": 0, "item": self._item()}
        yield {"type": f"response.{self._status()}", "response": self.response()}

    def _status(self) -> str:
        reason = self._events[-1].finish_reason if self._events else None
        if reason is None:
            return "in_progress"
        return "incomplete" if reason == "length" else "completed"

    def _place(self) -> Json:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, is_empty: bool = False) -> Json:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": self._status(),
            "content": [] if is_empty else [self._part()],
        }

    def _part(self) -> Json:
        text = "".join(event.text for event in self._events)
        return _text_part(text, token_logprobs(self._texts, self._events))

    def _usage(self) -> Json:
        completion_tokens = sum(event.token is not None for event in self._events)
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + completion_tokens,
        }


def _text_part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


async def whole_response(formatter: ResponsesFormatter, steps: AsyncIterator[StepOutput]) -> Json:
    """The response once the answer has ended."""
    async for step in steps:
        for event in step.events:
            formatter.add(event)
    return formatter.response()


async def response_events(
    formatter: ResponsesFormatter, steps: AsyncIterator[StepOutput]
) -> AsyncIterator[Json]:
    """The events of a stream, numbered."""
    number = count()
    async for event in _events(formatter, steps):
        yield {**event, "sequence_number": next(number)}


async def _events(formatter: ResponsesFormatter, steps: AsyncIterator[StepOutput]) -> AsyncIterator[Json]:
    for opening in formatter.opening():
        yield opening
    async for step in steps:
        for event in step.events:
            formatter.add(event)
            if event.text or event.logprob is not None:
                yield formatter.delta(event)
    for closing in formatter.closing():
        yield closing

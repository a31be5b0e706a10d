"""Engine steps as OpenAI's response objects, whole or as the events of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from itertools import count

import parallelmind as pm
from serving.engine.messages import StepOutput
from serving.protocol.openai_response import Json, TokenTexts, raise_error, token_logprobs
from serving.protocol.responses import ResponsesRequest
from serving.protocol.responses_output import CallOutput, MessageOutput
from serving.protocol.tool_calls import Piece, ToolCallParser


class ResponsesFormatter:
    """Format of /v1/responses: a message, and the calls of tools.

    id: of the response. prompt_tokens: of the conversation.
    """

    def __init__(self, id: str, body: ResponsesRequest, prompt_tokens: int, texts: TokenTexts) -> None:
        self._id, self._body, self._prompt_tokens, self._texts = id, body, prompt_tokens, texts
        self._created_at, self._name = int(time.time()), id.partition("-")[2]
        self._num_tokens = 0
        self._reason: str | None = None
        self._message: MessageOutput | None = None
        self._output: list[MessageOutput | CallOutput] = []
        names = [tool.name for tool in body.tools or []] if body.tool_choice != "none" else []
        self._parser = ToolCallParser(names, not body.parallel_tool_calls) if names else None
        self._logprobs: list[Json] = []  # of tokens whose text is withheld

    def opening(self) -> Iterator[Json]:
        """The events before the answer."""
        yield {"type": "response.created", "response": self.response()}
        yield {"type": "response.in_progress", "response": self.response()}

    def add(self, event: pm.Event) -> Iterator[Json]:
        """The events of one token. Raises RequestError if the answer ended with an error."""
        raise_error(event)
        self._num_tokens += event.token is not None
        self._reason = event.finish_reason
        self._logprobs += token_logprobs(self._texts, [event])
        yield from self._add(self._parse(event))

    def closing(self) -> Iterator[Json]:
        """The events after the answer."""
        if not self._output:
            yield from self._open_message()
        if self._message is not None:
            yield from self._message.closing(self._status())
        yield {"type": f"response.{self._status()}", "response": self.response()}

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
            "output": [item.item(status) for item in self._output],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.shown_format},
            "tool_choice": body.shown_choice,
            "tools": body.shown_tools,
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if status != "in_progress" else None,
            "user": body.user,
        }

    def _parse(self, event: pm.Event) -> Piece:
        if self._parser is None:
            return Piece(event.text, [])
        pieces = [self._parser.push(event.text)]
        if event.finish_reason:
            pieces.append(self._parser.flush())
        return Piece(
            "".join(piece.content for piece in pieces), [call for piece in pieces for call in piece.calls]
        )

    def _add(self, piece: Piece) -> Iterator[Json]:
        if piece.content or (self._logprobs and self._parser is None):
            if self._message is None:
                yield from self._open_message()
            assert self._message is not None
            yield self._message.append(piece.content, self._logprobs)
            self._logprobs = []
        for function, arguments in piece.calls:
            call = CallOutput(len(self._output), self._name, function, arguments)
            self._output.append(call)
            self._logprobs = []  # a call has none
            yield from call.events()

    def _open_message(self) -> Iterator[Json]:
        self._message = MessageOutput(len(self._output), self._name)
        self._output.append(self._message)
        return self._message.opening()

    def _status(self) -> str:
        if self._reason is None:
            return "in_progress"
        return "incomplete" if self._reason == "length" else "completed"

    def _usage(self) -> Json:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self._num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + self._num_tokens,
        }


async def whole_response(formatter: ResponsesFormatter, steps: AsyncIterator[StepOutput]) -> Json:
    """The response once the answer has ended."""
    response: Json = {}
    async for event in _events(formatter, steps):
        response = event.get("response", response)
    return response


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
            for added in formatter.add(event):
                yield added
    for closing in formatter.closing():
        yield closing

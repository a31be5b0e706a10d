"""The engine's steps as an answer: in one piece, or as server-sent events while they come."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from pydantic import BaseModel
from ray.serve.handle import DeploymentResponseGenerator

from serving.engine import Step
from serving.errors import FAILED
from serving.schema import Choice, Completion, CompletionRequest, ErrorBody, Usage

_log = logging.getLogger("ray.serve")


async def resumed(first: Step, rest: DeploymentResponseGenerator[Step]) -> AsyncIterator[Step]:
    """All steps. The engine stops if whoever reads them does."""
    try:
        yield first
        async for step in rest:
            yield step
    finally:
        rest.cancel()


async def whole(request: CompletionRequest, steps: AsyncIterator[Step]) -> Completion:
    """Every branch's text, once all have ended."""
    choices = [Choice(index=index, text="", finish_reason=None) for index in range(len(request.prompt))]
    prompt = completion = 0
    async for step in steps:
        prompt, completion = step.prompt_tokens, completion + len(step.pieces)
        for piece in step.pieces:
            choices[piece.branch].text += piece.text
            choices[piece.branch].finish_reason = piece.finish_reason
    return Completion(model=request.model, choices=choices, usage=Usage.of(prompt, completion))


async def server_sent(request: CompletionRequest, steps: AsyncIterator[Step]) -> AsyncIterator[str]:
    """One event per branch and step that has something to show. A failure midway is an event as well: the 200 is out."""
    part = Completion(model=request.model)
    prompt = completion = 0
    try:
        async for step in steps:
            prompt, completion = step.prompt_tokens, completion + len(step.pieces)
            for piece in step.pieces:
                if piece.text or piece.finish_reason:
                    choice = Choice(index=piece.branch, text=piece.text, finish_reason=piece.finish_reason)
                    yield _event(part.model_copy(update={"choices": [choice]}))
        if request.wants_usage:
            yield _event(part.model_copy(update={"usage": Usage.of(prompt, completion)}))
    except Exception:
        _log.exception("a stream failed midway")
        yield _event(ErrorBody(error=FAILED))
    yield "data: [DONE]\n\n"


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json()}\n\n"

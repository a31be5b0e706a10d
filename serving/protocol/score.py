"""Requests and responses of /v1/score: options after one text, each with its log-probability."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Literal

from pydantic import BaseModel, Field

import parallelmind as pm
from serving.engine.messages import EngineRequest, StepOutput
from serving.protocol.errors import decoding_error
from serving.protocol.fields import Items, StrictRequest, Text
from serving.protocol.openai import Message, Usage
from serving.protocol.openai_response import EXCLUDED_LOGPROB


class ScoreRequest(StrictRequest):
    """Options that each follow main on their own.

    main: a text, or messages in its place, which the header of the answer follows.
    """

    model: str
    main: Text = ""
    messages: Items[Message] | None = Field(None, min_length=1)
    options: Items[Text] = Field(min_length=1)


class OptionScore(BaseModel):
    """logprob: of the whole option, the sum of those of its tokens. mean_logprob: for each token."""

    index: int
    tokens: list[int]
    token_logprobs: list[float]
    num_tokens: int
    logprob: float
    mean_logprob: float


class ScoreResponse(BaseModel):
    """best: the index of the option with the largest logprob; best_mean: with the largest mean_logprob."""

    id: str
    object: Literal["scores"] = "scores"
    created: int
    model: str
    scores: list[OptionScore]
    best: int
    best_mean: int
    usage: Usage


async def score_response(request: EngineRequest, steps: AsyncIterator[StepOutput]) -> ScoreResponse:
    """The response once all options are read. Raises RequestError for an option that ended with an error."""
    scores: dict[int, OptionScore] = {}
    async for step in steps:
        for event in step.events:
            if event.error is not None:
                raise decoding_error(f"options[{event.branch}]: {event.error}")
            if event.prompt:
                scores[event.branch] = _score(event)
    in_order = [scores[index] for index in sorted(scores)]
    return ScoreResponse(
        id=request.id,
        created=int(time.time()),
        model=request.model,
        scores=in_order,
        best=max(in_order, key=lambda option: option.logprob).index,
        best_mean=max(in_order, key=lambda option: option.mean_logprob).index,
        usage=Usage.of(request.num_prompt_tokens, 0),
    )


def _score(event: pm.Event) -> OptionScore:
    # JSON has no infinity.
    logprobs = [max(token.logprob or 0.0, EXCLUDED_LOGPROB) for token in event.prompt]
    return OptionScore(
        index=event.branch,
        tokens=[token.token for token in event.prompt],
        token_logprobs=logprobs,
        num_tokens=len(logprobs),
        logprob=sum(logprobs),
        mean_logprob=sum(logprobs) / len(logprobs),
    )

"""The openai package, sync or async: models, answers by all routes, classes, tools, streams, errors."""

from __future__ import annotations

import asyncio
import inspect
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel

URL, MODEL, _, KIND = sys.argv[1:5]
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Name a colour."}]}
SHORT = {"max_tokens": 8, "temperature": 0}


class Sky(BaseModel):
    colour: Literal["red", "blue"]


async def done(call: Any) -> Any:
    """The result of a call of either client."""
    return await call if inspect.isawaitable(call) else call


async def items(stream: Any) -> list[Any]:
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


async def check_models(client: Any) -> None:
    names = [model.id for model in await items(client.models.list())]
    assert MODEL in names, names
    assert (await done(client.models.retrieve(MODEL))).id == MODEL


async def check_chat(client: Any) -> None:
    options = {"store": True, "metadata": {"run": "1"}, "reasoning_effort": "low", "user": "me"}
    answer = await done(client.chat.completions.create(**CHAT, **SHORT, **options, n=2, logprobs=True))
    text = answer.choices[0].message.content
    assert [choice.message.content for choice in answer.choices] == [text] * 2
    assert answer.choices[0].logprobs.content[0].logprob <= 0
    chunks = await items(
        await done(
            client.chat.completions.create(
                **CHAT, **SHORT, stream=True, stream_options={"include_usage": True}
            )
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    history = [
        *CHAT["messages"],
        answer.choices[0].message.model_dump(),
        {"role": "user", "content": "More."},
    ]
    assert (await done(client.chat.completions.create(**{**CHAT, "messages": history}, **SHORT))).choices


async def check_completions(client: Any) -> None:
    answer = await done(client.completions.create(model=MODEL, prompt=["A b", "C d"], **SHORT))
    assert [choice.index for choice in answer.choices] == [0, 1]
    echo = {"echo": True, "logprobs": 1, "max_tokens": 0}
    scored = await done(client.completions.create(model=MODEL, prompt="The sky is blue", **echo))
    logprobs = scored.choices[0].logprobs
    assert scored.choices[0].text == "The sky is blue" == "".join(logprobs.tokens)
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    ends = [*logprobs.text_offset[1:], len(scored.choices[0].text)]
    spans = [scored.choices[0].text[begin:end] for begin, end in zip(logprobs.text_offset, ends, strict=True)]
    assert spans == logprobs.tokens


async def check_responses(client: Any) -> None:
    asked = {"model": MODEL, "input": "Name a colour.", "max_output_tokens": 16, "temperature": 0}
    response = await done(client.responses.create(**asked, instructions="Be brief."))
    assert response.output_text
    events = await items(await done(client.responses.create(**asked, instructions="Be brief.", stream=True)))
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == response.output_text
    turns = [{"role": "user", "content": "Hi."}, *(item.model_dump() for item in response.output)]
    turns.append({"role": "user", "content": "More."})
    assert (await done(client.responses.create(**{**asked, "input": turns}))).output_text
    manager = client.responses.stream(**asked)
    if KIND == "async":
        async with manager as stream:
            final = [event async for event in stream][-1]
    else:
        with manager as stream:
            final = list(stream)[-1]
    assert final.type in ("response.completed", "response.incomplete"), final.type


async def check_classes(client: Any) -> None:
    """Answers that are objects of a class."""
    asked = {"role": "user", "content": "The sky?"}
    settings = {"model": MODEL, "temperature": 0}
    chat = client.chat.completions.parse
    answer = await done(chat(**settings, messages=[asked], response_format=Sky, max_tokens=128))
    response = await done(
        client.responses.parse(**settings, input=[asked], text_format=Sky, max_output_tokens=128)
    )
    assert isinstance(answer.choices[0].message.parsed, Sky)
    assert response.output_parsed == answer.choices[0].message.parsed


async def check_tools(client: Any) -> None:
    """A call, and an answer to its result."""
    asked: list[Any] = [{"role": "user", "content": "The sky?"}]
    settings = {"model": MODEL, "temperature": 0, "max_output_tokens": 128, "parallel_tool_calls": False}
    tool = openai.pydantic_function_tool(Sky, name="look")
    response = await done(
        client.responses.create(
            **settings, input=asked, tools=[{"type": "function", **tool["function"]}], tool_choice="required"
        )
    )
    (call,) = response.output
    assert isinstance(Sky.model_validate_json(call.arguments), Sky)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "seen"}
    assert (await done(client.responses.create(**settings, input=[*asked, call, result]))).output_text
    chat = {**CHAT, "temperature": 0, "max_tokens": 128, "tools": [tool], "parallel_tool_calls": False}
    answer = await done(client.chat.completions.create(**chat, tool_choice="required"))
    message = answer.choices[0].message
    assert Sky.model_validate_json(message.tool_calls[0].function.arguments)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "seen"}
    answer = await done(client.chat.completions.create(**{**chat, "messages": [*asked, message, result]}))
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


async def check_errors(client: Any) -> None:
    long = {"role": "user", "content": "word " * 10_000}
    for status, code, call, fields in (
        (404, "model_not_found", client.chat.completions.create, {**CHAT, "model": "gpt-4"}),
        (400, "context_length_exceeded", client.chat.completions.create, {**CHAT, "messages": [long]}),
        (400, "invalid_value", client.completions.create, {"model": MODEL, "prompt": "a", "suffix": "b"}),
        (404, "unknown_route", client.embeddings.create, {"model": MODEL, "input": "a"}),
    ):
        failure: Any = None
        try:
            await done(call(**fields))
        except openai.APIStatusError as error:
            failure = error
        assert failure is not None, f"no {code}"
        assert (failure.status_code, failure.code) == (status, code), failure


CHECKS = [
    check_models,
    check_chat,
    check_completions,
    check_responses,
    check_classes,
    check_tools,
    check_errors,
]


async def main() -> None:
    kind = openai.AsyncOpenAI if KIND == "async" else openai.OpenAI
    client = kind(base_url=URL, api_key="none", max_retries=0)
    for check in CHECKS:
        await check(client)


if __name__ == "__main__":
    asyncio.run(main())

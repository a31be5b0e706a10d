"""SmolLM2 behind a server: OpenAI's client parses its answers to a schema and its calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from servers import serving

pytestmark = [pytest.mark.slow, pytest.mark.model]

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASKED: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]


class City(BaseModel):
    name: str = Field(max_length=12)
    population: int = Field(le=9_999_999)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder: Path = tmp_path_factory.mktemp("structured")
    with serving(folder, base_model="smollm2-135m", compile=False, cache_tokens=4096) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_an_answer_follows_the_schema_of_a_class(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Oslo has 700000 people. Give its name and population."}]
    answer = client.chat.completions.parse(
        model="smollm2-135m", messages=question, response_format=City, n=2, seed=1, max_tokens=60
    )
    assert all(isinstance(choice.message.parsed, City) for choice in answer.choices)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]


def test_a_required_tool_is_called_whole_and_in_a_stream(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 60}
    settings |= {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(messages=ASKED, **settings).choices[0]
    (call,) = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    with client.chat.completions.stream(messages=ASKED, **settings) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments

    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*ASKED, choice.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(messages=history, **{**settings, "tool_choice": "auto"})
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": {"type": "strng"}},
        {"guided_regex": "(a"},
        {"guided_json": {"type": "string", "if": {}}},
    ],
)
def test_a_grammar_that_does_not_compile_is_a_400_with_its_field(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smollm2-135m", prompt="who", extra_body=fields)
    assert caught.value.param == next(iter(fields))

"""pydantic-ai by chat completions and by responses: conversations, streams, tools, and answers of a class."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL = sys.argv[1:3]
SETTINGS: Any = {"max_tokens": 256, "temperature": 0.0}


class Sky(BaseModel):
    colour: Literal["red", "blue"]
    clear: bool


class ToolThenAnswer(AbstractCapability[None]):
    """The first answer calls the tool `weather`, the second one the tool that returns the result."""

    def get_model_settings(self) -> Any:
        return lambda context: {"tool_choice": ["weather" if context.run_step == 1 else "final_result"]}


async def check_conversation(model: Any) -> None:
    agent = Agent(model, instructions="Be brief.", model_settings=SETTINGS)
    first = await agent.run("Name a colour.")
    assert first.output
    assert (await agent.run("Another one.", message_history=first.all_messages())).output
    async with agent.run_stream("Name a colour.") as stream:
        assert [text async for text in stream.stream_text(delta=True)]


async def check_tools(model: Any) -> None:
    """The answer calls a tool, reads its result, and returns an object by another tool."""
    agent = Agent(
        model,
        output_type=ToolOutput(Sky, name="final_result"),
        model_settings=SETTINGS,
        capabilities=[ToolThenAnswer()],
    )
    asked = []

    @agent.tool_plain
    def weather(city: Literal["Oslo", "Rome"]) -> str:
        asked.append(city)
        return "blue"

    assert isinstance((await agent.run("The sky?")).output, Sky)
    assert len(asked) == 1
    async with agent.run_stream("The sky?") as stream:
        assert isinstance(await stream.get_output(), Sky)
    assert asked == [asked[0]] * 2


async def check_schema(model: Any) -> None:
    agent = Agent(model, output_type=NativeOutput(Sky), model_settings=SETTINGS)
    whole = (await agent.run("The sky?")).output
    assert isinstance(whole, Sky)
    async with agent.run_stream("The sky?") as stream:
        assert await stream.get_output() == whole


async def main() -> None:
    provider = OpenAIProvider(base_url=URL, api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(MODEL, provider=provider)
        for check in (check_conversation, check_tools, check_schema):
            await check(model)


if __name__ == "__main__":
    asyncio.run(main())

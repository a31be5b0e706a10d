"""pydantic-ai: a conversation by chat completions, whole and streamed, and by responses."""

from __future__ import annotations

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL = sys.argv[1:3]


async def main() -> None:
    provider = OpenAIProvider(base_url=URL, api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(
            kind(MODEL, provider=provider),
            instructions="Be brief.",
            model_settings={"max_tokens": 64, "temperature": 0.0},
        )
        first = await agent.run("Name a colour.")
        assert first.output
        assert (await agent.run("Another one.", message_history=first.all_messages())).output
        async with agent.run_stream("Name a colour.") as stream:
            assert [text async for text in stream.stream_text(delta=True)]


if __name__ == "__main__":
    asyncio.run(main())

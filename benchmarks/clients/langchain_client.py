"""langchain-openai: chat, streams, batches, history, responses, and its error for long prompts."""

from __future__ import annotations

import sys
from typing import Any

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

URL, MODEL = sys.argv[1:3]
SERVER: dict[str, Any] = {"base_url": URL, "api_key": "none", "model": MODEL, "temperature": 0}


def main() -> None:
    chat = ChatOpenAI(**SERVER, max_tokens=8, max_retries=0, stream_usage=True)
    asked = [HumanMessage("Name a colour.")]
    answer = chat.invoke(asked)
    assert answer.usage_metadata
    assert "".join(str(chunk.content) for chunk in chat.stream(asked)) == answer.content
    assert [other.content for other in chat.batch([asked, asked])] == [answer.content] * 2
    assert chat.invoke([*asked, answer, HumanMessage("More.")]).content is not None
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(asked)
    assert len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert OpenAI(**SERVER, max_tokens=8).invoke("The sky is")
    responses = ChatOpenAI(**SERVER, max_tokens=16, use_responses_api=True)
    text = responses.invoke(asked).text
    assert text
    assert "".join(chunk.text for chunk in responses.stream(asked)) == text
    try:
        failure: Any = chat.invoke("word " * 10_000)
    except ContextOverflowError as error:
        failure = error
    assert isinstance(failure, ContextOverflowError), failure


if __name__ == "__main__":
    main()

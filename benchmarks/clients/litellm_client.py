"""litellm: chat, streams, text completions, responses, and its mapping of errors."""

from __future__ import annotations

import sys
from typing import Any

import litellm

URL, MODEL = sys.argv[1:3]
ASKED: dict[str, Any] = {"api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": 8}
CHAT = {**ASKED, "model": f"openai/{MODEL}", "messages": [{"role": "user", "content": "Name a colour."}]}


def main() -> None:
    answer = litellm.completion(**CHAT)
    message = answer.choices[0].message
    chunks = list(litellm.completion(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == message.content
    )
    history = [*CHAT["messages"], message.model_dump(), {"role": "user", "content": "More."}]
    assert litellm.completion(**{**CHAT, "messages": history}).choices
    text = litellm.text_completion(**ASKED, model=f"text-completion-openai/{MODEL}", prompt="The sky is")
    assert text.choices[0].text
    asked = {"model": f"openai/{MODEL}", "input": "Name a colour.", "max_output_tokens": 16}
    assert litellm.responses(**asked, api_base=URL, api_key="none").output
    long = [{"role": "user", "content": "word " * 10_000}]
    try:
        litellm.completion(**{**CHAT, "messages": long})
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("no ContextWindowExceededError")


if __name__ == "__main__":
    main()

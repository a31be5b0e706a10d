"""Fields that OpenAI's clients send on their own are taken as they mean them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from tiny import tiny_tokenizer

from serving.config import AppConfig
from serving.ingress.preprocessor import RequestPreprocessor
from serving.protocol.openai import ChatRequest, CompletionRequest

TEMPLATE_WITH_NAMES = (
    "{% for m in messages %}{{ m['role'] }}{% if 'name' in m %} {{ m.name }}{% endif %}: "
    "{{ m.content }};{% endfor %}"
)
SAMPLING = [
    "temperature",
    "top_p",
    "n",
    "stream",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "user",
    "logit_bias",
]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"model": "tiny", "prompt": "who", **fields})


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest(**{"model": "tiny", "messages": [{"role": "user", "content": "who"}], **fields})


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (completion, [*SAMPLING, "stream_options", "max_tokens", "logprobs", "best_of", "echo", "suffix"]),
        (
            chat,
            [
                *SAMPLING,
                "stream_options",
                "max_tokens",
                "max_completion_tokens",
                "logprobs",
                "top_logprobs",
                "tools",
            ],
        ),
    ],
)
def test_null_means_that_a_field_is_not_given(call: Any, names: list[str]) -> None:
    request = call(**dict.fromkeys(names))
    assert (request, request.model_fields_set) == (call(), call().model_fields_set)


@pytest.mark.parametrize(
    ("call", "fields"),
    [(completion, {"model": None}), (completion, {"prompt": None}), (chat, {"nonsense": None})],
)
def test_null_is_refused_for_required_and_unknown_fields(call: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        call(**fields)


def test_a_response_message_can_be_sent_back_and_the_template_reads_names() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE_WITH_NAMES
    messages = [
        {"role": "user", "content": "who", "name": "ann"},
        {"role": "assistant", "content": "you", "refusal": None},
        {"role": "user", "content": "me", "name": None},
    ]
    main, turn = (
        RequestPreprocessor(AppConfig.of({"base_model": "tiny"}), tokenizer, 4096)
        .chat(chat(messages=messages))
        .samples[0]
        .tokens.split()
    )
    assert tokenizer.decode(main + turn) == "user ann: who;assistant: you;user: me;"

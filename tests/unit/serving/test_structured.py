"""The fields of structured output, by the names of OpenAI and of vLLM, reach each branch as its grammar."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from asgi import ONE_TOKEN_STEPS, ingress_app, post_json
from tiny import tiny_tokenizer

import parallelmind as pm
from parallelmind.engine.grammar import Grammar
from serving.config import AppConfig
from serving.ingress.preprocessor import RequestPreprocessor
from serving.protocol.branches import BranchesRequest
from serving.protocol.openai import ChatRequest, CompletionRequest

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
FIELDS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        {"json": SCHEMA},
    ),
    ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json": SCHEMA}),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ({"structured_outputs": {"json_object": True}}, {"json": {"type": "object"}}),
    ({"guided_json": SCHEMA}, {"json": SCHEMA}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
]


def preprocessor() -> RequestPreprocessor:
    config = AppConfig.of({"base_model": "x", "served_name": "tiny"})
    return RequestPreprocessor(config, tiny_tokenizer(), 4096)


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_every_name_becomes_the_grammar_of_all_answers(
    fields: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    grammar = None if expected is None else Grammar.of(expected)
    messages = [{"role": "user", "content": "who"}]
    requests = [
        preprocessor().completion(CompletionRequest(model="tiny", prompt="who", n=2, **fields)),
        preprocessor().chat(ChatRequest(model="tiny", messages=messages, n=2, **fields)),
        preprocessor().branches(BranchesRequest(model="tiny", branches=[{"text": "a"}], **fields)),
    ]
    for request in requests:
        assert {params.grammar for sample in request.samples for params in sample.params} == {grammar}


def test_a_branch_has_a_grammar_of_its_own() -> None:
    body = {
        "model": "tiny",
        "guided_choice": ["a"],
        "branches": [
            {"text": "a"},
            {"text": "b", "guided_regex": "b"},
            {"text": "c", "response_format": None},
        ],
    }
    (sample,) = preprocessor().branches(BranchesRequest(**body)).samples
    found = [params.grammar for params in sample.params]
    assert found == [Grammar.of({"choice": ["a"]}), Grammar.of({"regex": "b"}), None]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schem": {}}}}, None),
        ({"guided_json": {"type": "array", "maxItems": 10**9}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "a" * 100_000}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_a_wrong_grammar_is_a_400_that_names_its_field(
    tmp_path: Path, fields: dict[str, Any], param: str | None
) -> None:
    app = ingress_app(tmp_path, ONE_TOKEN_STEPS)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "who"}], **fields}
    reply = asyncio.run(post_json(app, "/v1/chat/completions", body))
    assert reply.status == 400, reply.body
    assert str(reply.error["param"]).startswith(param or "response_format.json_schema")


def test_the_field_of_a_grammar_does_not_tell_grammars_apart() -> None:
    assert Grammar.of({"regex": "a"}, "guided_regex") == pm.SamplingParams(grammar={"regex": "a"}).grammar

"""Many questions about one document: however they are asked, the document is computed once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx2
import pytest
from engine_loops import with_server
from openai import AsyncOpenAI
from starlette.types import ASGIApp
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from parallelmind.config import ModelConfig
from parallelmind.engine.engine import Engine
from parallelmind.evaluation.facts import facts_records
from parallelmind.model.base_model import load_tokenizer
from serving.config import AppConfig
from serving.ingress.independent import common_beginning
from serving.ingress.preprocessor import RequestPreprocessor
from serving.protocol.branches import BranchesRequest
from serving.protocol.openai import ChatRequest

TOKENIZER = tiny_tokenizer()
WORDS = "the passage says who lives where and what the answer is in the question of who works where. "
SETTINGS: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6}


def num_tokens(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False).input_ids)


def document_of(length: int) -> str:
    """A text of about this many tokens."""
    words = (WORDS * 40).split(" ")
    return " ".join(words[: next(n for n in range(len(words)) if num_tokens(" ".join(words[:n])) >= length)])


DOCUMENT = document_of(501)
QUESTIONS = [f"\nQuestion {index}: who works in the passage?" for index in range(8)]
TURNS = [{"role": "system", "content": DOCUMENT}]
IGNORE_EOS = {"ignore_eos": True}


def connect(app: ASGIApp) -> AsyncOpenAI:
    """OpenAI's own client."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1")
    return AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=http, max_retries=0)


async def ask_whole_prompts(client: AsyncOpenAI, questions: list[str]) -> list[str]:
    prompts = [DOCUMENT + question for question in questions]
    reply = await client.completions.create(**SETTINGS, prompt=prompts, extra_body=IGNORE_EOS)
    return [choice.text for choice in reply.choices]


async def ask_beside_main(client: AsyncOpenAI, questions: list[str]) -> list[str]:
    extra = {"main": DOCUMENT, **IGNORE_EOS}
    reply = await client.completions.create(**SETTINGS, prompt=questions, extra_body=extra)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == num_tokens(DOCUMENT) + sum(map(num_tokens, questions))
    return [choice.text for choice in reply.choices]


async def ask_chat(client: AsyncOpenAI, questions: list[str]) -> list[str]:
    extra = {"questions": questions, **IGNORE_EOS}
    reply = await client.chat.completions.create(**SETTINGS, messages=TURNS, extra_body=extra)  # type: ignore[arg-type]
    assert [choice.index for choice in reply.choices] == list(range(len(questions)))
    return [choice.message.content or "" for choice in reply.choices]


async def ask_texts(client: AsyncOpenAI, questions: list[str]) -> list[str]:
    return await ask_branches(client, {"main": DOCUMENT, "branches": questions})


async def ask_messages(client: AsyncOpenAI, questions: list[str]) -> list[str]:
    turns = [{"role": "user", "content": question} for question in questions]
    return await ask_branches(client, {"messages": TURNS, "branches": turns})


async def ask_branches(client: AsyncOpenAI, body: dict[str, Any]) -> list[str]:
    reply: Any = await client.post("/branches", body={**SETTINGS, **IGNORE_EOS, **body}, cast_to=object)
    return [branch["text"] for branch in reply["branches"]]


async def ask_requests(client: AsyncOpenAI, questions: list[str]) -> list[str]:
    return [(await ask_whole_prompts(client, [question]))[0] for question in questions]


Ask = Callable[[AsyncOpenAI, list[str]], Coroutine[Any, Any, list[str]]]
INDEPENDENT = {
    "prompts": ask_whole_prompts,
    "main": ask_beside_main,
    "questions": ask_chat,
}
COUPLED = {"branches": ask_texts, "messages": ask_messages}


@pytest.mark.parametrize("ask", [*INDEPENDENT.values(), *COUPLED.values()], ids=[*INDEPENDENT, *COUPLED])
def test_eight_questions_compute_the_document_once(tmp_path: Path, ask: Ask) -> None:
    async def act(app: ASGIApp, engine: Engine, _: Any) -> int:
        assert len(await ask(connect(app), QUESTIONS)) == 8
        return engine.scheduler.num_prefill.total() - engine.scheduler.num_reused_tokens

    computed = with_server(tmp_path, act)
    if ask in (ask_chat, ask_messages):
        assert computed == least_computed(TOKENIZER, TURNS, QUESTIONS)
    else:
        assert computed <= num_tokens(DOCUMENT) + sum(map(num_tokens, QUESTIONS))


def least_computed(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], questions: list[str]
) -> int:
    """Tokens of the chat template before the contents of the questions once, and all others."""
    whole = [
        tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": question}], add_generation_prompt=True
        ).input_ids
        for question in [*questions, "0"]
    ]
    shared = len(common_beginning(whole))
    return shared + sum(len(ids) - shared for ids in whole[:-1])


@pytest.mark.model
def test_of_smollm2s_template_only_the_question_and_the_header_of_its_answer_are_computed_for_each() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    words = tokenizer.encode(" ".join(record["main"] for record in facts_records(9, seed=0)))
    turns = [{"role": "system", "content": tokenizer.decode(words[:501])}]
    prompts = [branch["prompt"] for branch in next(iter(facts_records(1, seed=1)))["branches"]]
    questions = [prompt.removeprefix(" Question: ").removesuffix("\nAnswer:") for prompt in prompts]
    preprocessor = RequestPreprocessor(AppConfig.of({"base_model": "smollm2-135m"}), tokenizer, None)
    branches = [{"role": "user", "content": question} for question in questions]
    model = {"model": "smollm2-135m", "messages": turns}
    asked = {
        "questions": preprocessor.chat(ChatRequest(**model, questions=questions)),
        "branches": preprocessor.branches(BranchesRequest(**model, branches=branches)),
    }
    header = 6  # <|im_end|>, a line break, <|im_start|>, two tokens of "assistant", a line break
    least = 501 + 8 + sum(len(tokenizer.encode(question)) + header for question in questions)
    assert least == least_computed(tokenizer, turns, questions)
    computed = {name: sum(s.num_prompt_tokens for s in request.samples) for name, request in asked.items()}
    assert computed == {"questions": least, "branches": least}
    assert least <= 650


@pytest.mark.parametrize("ask", INDEPENDENT.values(), ids=INDEPENDENT)
def test_an_answer_about_a_document_is_the_same_alone_and_in_any_order(tmp_path: Path, ask: Ask) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        client = connect(app)
        alone = [(await ask(client, [question]))[0] for question in QUESTIONS[:3]]
        assert await ask(client, QUESTIONS[:3]) == alone
        assert await ask(client, QUESTIONS[2::-1]) == alone[::-1]

    with_server(tmp_path, act)


def test_requests_that_begin_alike_share_blocks(tmp_path: Path) -> None:
    async def act(app: ASGIApp, engine: Engine, _: Any) -> tuple[list[str], int]:
        answers = await ask_requests(connect(app), QUESTIONS[:3])
        return answers, engine.scheduler.num_prefill.total() - engine.scheduler.num_reused_tokens

    async def act_at_once(app: ASGIApp, *_: Any) -> list[str]:
        return await ask_whole_prompts(connect(app), QUESTIONS[:3])

    answers, computed = with_server(tmp_path, act)
    assert computed <= num_tokens(DOCUMENT) + 3 * (num_tokens(QUESTIONS[0]) + 16)
    assert answers == with_server(tmp_path, act_at_once)

"""Documents of /v1/branches: the response, what is computed, and requests that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from asgi import send_request
from engine_loops import with_server
from engines import ISOLATED
from starlette.types import ASGIApp

from parallelmind.engine.engine import Engine
from serving.observability.metrics import EngineMetrics

DOCUMENTS = ["the passage is in the answer", "who lives in where and works", "what the question is"]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "ignore_eos": True, "main": "the answer"}


async def post(app: ASGIApp, **body: Any) -> Any:
    headers = {"content-type": "application/json"}
    content = [json.dumps({**BODY, **body}).encode()]
    return await send_request(app, "POST", "/v1/branches", headers, content)


def test_the_response_holds_the_answer_and_any_order_finds_the_documents(tmp_path: Path) -> None:
    async def act(app: ASGIApp, engine: Engine, _: Any) -> None:
        reply = json.loads((await post(app, documents=DOCUMENTS, reduce=" who?")).body)
        assert reply["branches"] == []
        assert reply["reduce"]["path"] == "reduce"
        assert len(reply["reduce"]["tokens"]) == 4
        before = engine.scheduler.num_reused["document"]
        assert before == 0
        reply = json.loads((await post(app, documents=DOCUMENTS[::-1], reduce=" what?")).body)
        lengths = [len(ids) for ids in engine.tokenizer(DOCUMENTS).input_ids]
        assert engine.scheduler.num_reused["document"] == sum(lengths) + len(DOCUMENTS)  # with their EOS
        texts = _metrics(engine)
        assert texts["parallelmind_document_reused_share"] == 0.5

    with_server(tmp_path, act, config=ISOLATED)


def _metrics(engine: Engine) -> dict[str, float]:
    families = EngineMetrics(lambda: 0).families_of(engine.stats())
    return {name: value for family in families for name, _, value in family.samples}


def test_several_questions_read_the_documents_as_branches_of_the_reduce(tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        reduce = {"text": " Answer.", "max_tokens": 0, "branches": [" who?", " what?"]}
        reply = json.loads((await post(app, documents=DOCUMENTS, reduce=reduce)).body)
        below = reply["reduce"]["branches"]
        assert [branch["path"] for branch in below] == ["reduce.branches[0]", "reduce.branches[1]"]
        assert all(len(branch["tokens"]) == 4 for branch in below)

    with_server(tmp_path, act, config=ISOLATED)


def test_a_stream_names_documents_by_their_place(tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        reply = await post(app, documents=DOCUMENTS, branches=[" so"], reduce=" who?", stream=True)
        starts = [start for event in reply.events for start in event.get("branches", [])]
        expected = ["documents[0]", "documents[1]", "documents[2]", "branches[0]", "reduce"]
        assert [start["path"] for start in starts] == expected
        assert len({start["branch"] for start in starts[:3]}) == 1

    with_server(tmp_path, act, config=ISOLATED)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"documents": DOCUMENTS}, "documents: nothing reads them; give the question as reduce"),
        ({}, "branches=[]: give at least one, or documents and a reduce"),
        ({"documents": ["a", ""], "reduce": "b"}, "documents[1]: holds no token"),
        ({"documents": "a", "reduce": "b"}, "documents"),
    ],
)
def test_requests_that_are_refused(body: dict[str, Any], message: str, tmp_path: Path) -> None:
    async def act(app: ASGIApp, *_: Any) -> None:
        reply = await post(app, **body)
        assert reply.status == 400
        assert message in reply.error["message"]

    with_server(tmp_path, act, config=ISOLATED)

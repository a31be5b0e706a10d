"""Options after one main are scored in one pass, each as if it were the only one."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from asgi import ingress_app, post_json
from engine_loops import with_server
from engines import run_to_end, tiny_engine
from starlette.types import ASGIApp
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event, TokenLogprob
from serving.config import AppConfig
from serving.engine.messages import EngineRequest, StepOutput
from serving.ingress.preprocessor import RequestPreprocessor
from serving.protocol.openai import CompletionRequest
from serving.protocol.score import ScoreRequest

TOKENIZER = tiny_tokenizer()
MAIN, OPTIONS = "The answer to the question is in", [" the passage.", " works", " who lives where"]
TALK = [{"role": "user", "content": "who"}]


def ids(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return token_ids


def preprocessor(**settings: Any) -> RequestPreprocessor:
    config = AppConfig.of({"base_model": "x", "served_name": "tiny", **settings})
    return RequestPreprocessor(config, TOKENIZER, 4096)


def decode(request: EngineRequest) -> dict[int, list[float | None]]:
    """Log-probabilities of the tokens of each option, at the positions of a plain text."""
    engine = tiny_engine(RopeConfig(visibility="isolated", rope_2d_ratio=0, positions="time"))
    for sample in request.samples:
        engine.enqueue(sample)
    return {event.branch: [token.logprob for token in event.prompt] for event in run_to_end(engine)}


def full_pass(main: list[int], option: list[int]) -> list[float]:
    """Log-probabilities of the option in one pass of the unpatched model, in float32."""
    with torch.no_grad():
        logprobs = tiny_llama()(torch.tensor([main + option])).logits[0].log_softmax(-1)
    return [float(logprobs[len(main) - 1 + index, token]) for index, token in enumerate(option)]


def test_scores_are_those_of_full_passes() -> None:
    request = preprocessor().score(ScoreRequest(model="tiny", main=MAIN, options=OPTIONS))
    (sample,) = request.samples
    assert sample.tokens.split() == [ids(MAIN), *map(ids, OPTIONS)]
    found = decode(request)
    for index, option in enumerate(OPTIONS):
        assert found[index] == pytest.approx(full_pass(ids(MAIN), ids(option)), abs=1e-4)


def test_options_may_follow_the_header_of_an_answer() -> None:
    messages = preprocessor().score(ScoreRequest(model="tiny", messages=TALK, options=OPTIONS))
    main = ids("<s>user\nwho</s>\n<s>assistant\n")
    text = preprocessor().score(ScoreRequest(model="tiny", main=main, options=[*map(ids, OPTIONS)]))
    assert messages.samples[0].tokens.split() == text.samples[0].tokens.split()
    assert messages.num_prompt_tokens == len(main) + sum(map(len, map(ids, OPTIONS)))


def test_the_route_computes_main_once_and_sums_log_probabilities(tmp_path: Path) -> None:
    async def act(app: ASGIApp, engine: Engine, _: Any) -> tuple[dict[str, Any], int]:
        reply = await post_json(app, "/v1/score", {"model": "tiny", "main": MAIN, "options": OPTIONS})
        assert reply.status == 200, reply.body
        return json.loads(reply.body), engine.scheduler.num_prefill.total()

    found, computed = with_server(tmp_path, act)
    assert computed == len(ids(MAIN)) + sum(map(len, map(ids, OPTIONS)))
    assert found["usage"] == {"prompt_tokens": computed, "completion_tokens": 0, "total_tokens": computed}
    assert [score["tokens"] for score in found["scores"]] == [*map(ids, OPTIONS)]
    for index, score in enumerate(found["scores"]):
        assert (score["index"], score["num_tokens"]) == (index, len(ids(OPTIONS[index])))
        assert score["logprob"] == pytest.approx(sum(score["token_logprobs"]))
        assert score["mean_logprob"] == pytest.approx(score["logprob"] / score["num_tokens"])
    for best, field in (("best", "logprob"), ("best_mean", "mean_logprob")):
        assert found[best] == max(range(3), key=lambda index: found["scores"][index][field])


def test_an_excluded_token_is_a_number_and_a_failed_option_an_error(tmp_path: Path) -> None:
    body = {"model": "tiny", "main": MAIN, "options": ["a"]}
    event = Event(0, "", 5, "length", prompt=(TokenLogprob(65, -math.inf), TokenLogprob(66, -0.5)))
    app = ingress_app(tmp_path, [StepOutput([event], [])])
    (score,) = json.loads(asyncio.run(post_json(app, "/v1/score", body)).body)["scores"]
    assert score["token_logprobs"] == [-9999.0, -0.5]
    failed = StepOutput([event._replace(finish_reason="error", error="not finite", prompt=())], [])
    reply = asyncio.run(post_json(ingress_app(tmp_path, [failed]), "/v1/score", body))
    assert (reply.status, reply.error["message"]) == (500, "options[0]: not finite")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"main": ""}, "main"),
        ({"messages": TALK}, "main"),
        ({"options": []}, "options"),
        ({"options": ["a", ""]}, "options[1]"),
        ({"options": ["a"] * 65}, "options"),
        ({"options": "a"}, "options"),
        ({"main": "a " * 5000}, "main"),
        ({"temperature": 0}, "temperature"),
        ({"model": "gpt-4"}, "model"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "main": MAIN, "options": OPTIONS, **fields}
    reply = asyncio.run(post_json(ingress_app(tmp_path), "/v1/score", body))
    assert (reply.status // 100, reply.error["param"]) == (4, param), reply.body


def test_completions_score_options_too() -> None:
    def scored(options: list[str]) -> dict[int, list[float | None]]:
        body = CompletionRequest(
            model="tiny", main=MAIN, prompt=options, echo=True, logprobs=0, max_tokens=0, temperature=0
        )
        return decode(preprocessor().completion(body))

    score = preprocessor().score(ScoreRequest(model="tiny", main=MAIN, options=OPTIONS))
    assert scored(OPTIONS) == decode(score)
    for index, option in enumerate(OPTIONS):
        assert scored([option])[0] == pytest.approx(scored(OPTIONS)[index], abs=1e-4)

"""The server as its clients see it: OpenAI's own client, plain HTTP, and whoever leaves early."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from servers import LOOPBACK, Server, listening, save_talker, serving

import parallelmind as pm

pytestmark = pytest.mark.slow
PROMPTS = ["the question is", " who works in the passage?"]
GREEDY = {"model": "talker", "prompt": PROMPTS, "max_tokens": 24, "temperature": 0}
MAIN, QUESTIONS = "the passage says who works where.", [" who?", " where is the work?"]
BRANCHES = {
    "model": "talker",
    "main": MAIN,
    "branches": [{"text": text} for text in QUESTIONS],
    "max_tokens": 12,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_talker(tmp_path_factory.mktemp("serving") / "talker")


@pytest.fixture(scope="module")
def server(base: str) -> Iterator[Server]:
    with serving(
        Path(base).parent / "server", base_model=base, max_requests=16, max_body_bytes=65536
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(base: str) -> Any:
    return pm.load_model_with_lora(base)


@pytest.fixture(scope="module")
def expected(model: Any) -> list[str]:
    return pm.generate(*model, pm.Sample(branches=PROMPTS), max_new_tokens=24)


def test_openais_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["talker", "base"]


def test_prompts_are_branches_of_one_sample(client: openai.OpenAI, expected: list[str]) -> None:
    found = client.completions.create(**GREEDY)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in found.choices] == [
        (0, expected[0], "length"),
        (1, expected[1], "length"),
    ]
    assert found.usage is not None
    assert found.usage.completion_tokens == 48


def test_a_stream_says_the_same(client: openai.OpenAI, expected: list[str]) -> None:
    texts, reasons, usage = ["", ""], [None, None], None
    for part in client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == (expected, ["length", "length"])
    assert usage == client.completions.create(**GREEDY).usage


def test_answers_to_a_conversation_are_branches_that_share_it(client: openai.OpenAI, model: Any) -> None:
    asked: Any = {
        "model": "talker",
        "messages": [{"role": "user", "content": "who works?"}],
        "temperature": 0,
        "max_tokens": 9,
    }
    found = client.chat.completions.create(**asked, n=2)
    text = model[1].apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
    main, turn = text[: -len("<s>assistant\n")], "<s>assistant\n"
    expected = pm.generate(*model, pm.Sample(main, [turn] * 2), max_new_tokens=9)
    assert [choice.message.content for choice in found.choices] == expected
    streamed = ["", ""]
    for part in client.chat.completions.create(**asked, n=2, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected


def test_a_seed_repeats_and_its_absence_does_not(client: openai.OpenAI) -> None:
    def texts(**seed: Any) -> list[str]:
        return [
            choice.text
            for choice in client.completions.create(**{**GREEDY, "temperature": 1.0, "n": 2, **seed}).choices
        ]

    assert texts(seed=7) == texts(seed=7)
    assert texts() != texts()
    assert len(set(texts(seed=7))) == 4


def test_logprobs_are_those_of_the_library(client: openai.OpenAI, model: Any) -> None:
    found = (
        client.completions.create(**{**GREEDY, "prompt": PROMPTS[0], "max_tokens": 4}, logprobs=3)
        .choices[0]
        .logprobs
    )
    events = list(pm.stream(*model, pm.Sample(branches=PROMPTS[:1]), max_new_tokens=4, logprobs=3))
    assert found is not None
    assert found.token_logprobs == pytest.approx([event.logprob for event in events], abs=1e-4)
    assert [len(each) for each in found.top_logprobs or []] == [3] * 4


def test_branches_have_settings_of_their_own_and_coordinates(server: Server, model: Any) -> None:
    own = {
        **BRANCHES,
        "branches": [{"text": QUESTIONS[0], "max_tokens": 3}, {"text": QUESTIONS[1]}],
        "reduce": " so",
    }
    status, found = server.post("/v1/branches", own)
    settings: list[dict[str, Any]] = [{"max_new_tokens": 3}, {}]
    expected = pm.generate(
        *model, pm.Sample(MAIN, QUESTIONS), per_branch=settings, reduce=" so", max_new_tokens=12
    )
    assert status == 200
    assert [branch["text"] for branch in found["branches"]] == expected
    assert [len(branch["tokens"]) for branch in found["branches"]] == [3, 12, 12]
    assert [branch["branch"] for branch in found["branches"]] == [16, 32, 48]


def test_one_branch_is_stopped_and_another_joins_while_a_sample_goes_on(server: Server) -> None:
    sample, reasons, tokens = "", {}, dict[int, int]()
    for event in server.stream("/v1/branches", {**BRANCHES, "max_tokens": 200}):
        if event == "[DONE]":
            break
        for delta in event.get("deltas", []):
            tokens[delta["index"]] = tokens.get(delta["index"], 0) + (delta["token"] is not None)
            reasons[delta["index"]] = delta["finish_reason"]
        if event["object"] == "branches.begun":
            sample = event["id"]
            assert (
                server.post(f"/v1/branches/{sample}/branches", {"text": " when?", "max_tokens": 5})[0] == 201
            )
            assert server.request("DELETE", f"/v1/branches/{sample}/branches/0").status == 204
    assert reasons == {0: "cancelled", 1: "length", 2: "length"}
    assert (tokens[1], tokens[2]) == (200, 5)
    assert tokens[0] < 200
    assert server.request("DELETE", f"/v1/branches/{sample}").status == 404


def test_text_comes_back_from_its_tokens(server: Server) -> None:
    _, found = server.post("/tokenize", {"prompt": PROMPTS[0]})
    assert found["count"] == len(found["tokens"])
    assert server.post("/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": PROMPTS[0]}


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"temperature": -1, "stream": True}, 400, "temperature", "invalid_value"),
        ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ({"max_tokens": 5000}, 400, "max_tokens", "invalid_value"),
        ({"prompt": ["a", ""]}, 400, "prompt[1]", "invalid_value"),
        ({"prompt": [[5, 10**6]]}, 400, None, "invalid_value"),
        ({"n": 99}, 400, "n", "invalid_value"),
        ({"temprature": 1}, 400, "temprature", "unknown_parameter"),
        ({"model": "other"}, 404, "model", "model_not_found"),
    ],
)
def test_a_refusal_has_openais_shape(
    server: Server, change: dict[str, Any], status: int, param: str, code: str
) -> None:
    found, body = server.post("/v1/completions", {**GREEDY, **change})
    error = body["error"]
    assert (found, error["type"], error["param"], error["code"]) == (
        status,
        "invalid_request_error",
        param,
        code,
    )
    assert param is None or param in error["message"]
    assert "\n" not in error["message"]


def test_too_many_at_once_are_told_to_come_again(server: Server) -> None:
    working = [server.connect("POST", "/v1/completions", {**GREEDY, "max_tokens": 200}) for _ in range(16)]
    deadline = time.monotonic() + 20
    while server.meter("open_requests") <= 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    with server.request("POST", "/v1/completions", GREEDY) as refused:
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert [connection.getresponse().status for connection in working] == [200] * 16
    assert server.post("/v1/completions", GREEDY)[0] == 200


@pytest.mark.parametrize("late_s", [0, 0.1])
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_engine(server: Server, stream: bool, late_s: float) -> None:
    """late_s: how long after its headers the body comes."""
    body = json.dumps({**GREEDY, "max_tokens": 400, "stream": stream}).encode()
    parts = (time.sleep(late_s) or body for _ in range(1))
    leaver = server.connect("POST", "/v1/completions", parts, **{"content-length": str(len(body))})
    deadline = time.monotonic() + 20
    while not server.meter("live_branches"):
        assert time.monotonic() < deadline
    leaver.close()
    left = time.monotonic()
    while server.meter("live_branches"):
        assert time.monotonic() < left + 2
    assert server.meter("open_requests") == 1  # the one that asks


def test_a_body_that_is_too_long_is_not_read(server: Server) -> None:
    status, body = server.post("/v1/completions", {**GREEDY, "prompt": "x" * 70000})
    assert (status, body["error"]["code"]) == (413, "too_large")


def test_meters_and_health_are_open_to_see(server: Server) -> None:
    assert server.get("/health") == (200, {"status": "ok"})
    for name in (
        "requests_total",
        "time_to_first_token_seconds_count",
        "step_seconds_count",
        "cache_tokens",
        "tokens_total",
    ):
        assert server.meter(name) > 0, name


def test_nothing_listens_beyond_this_machine(server: Server) -> None:
    addresses = listening(psutil.Process(server.process.pid))
    assert addresses
    assert addresses <= LOOPBACK

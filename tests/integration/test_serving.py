"""The server as its clients see it: OpenAI's own client, plain HTTP, and clients that leave early."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import psutil
import pytest
from servers import LOOPBACK, Server, listening

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
def client(shared_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared_server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(talker: str) -> Any:
    return pm.load_model_with_lora(talker)


@pytest.fixture(scope="module")
def expected(model: Any) -> list[str]:
    return [pm.generate(*model, pm.Sample(branches=[prompt]), max_new_tokens=24)[0] for prompt in PROMPTS]


def test_openais_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["talker", "base"]


def test_prompts_are_answered_as_if_each_were_alone(client: openai.OpenAI, expected: list[str]) -> None:
    response = client.completions.create(**GREEDY)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in response.choices] == [
        (0, expected[0], "length"),
        (1, expected[1], "length"),
    ]
    assert response.usage is not None
    assert response.usage.completion_tokens == 48


def test_a_stream_holds_the_same_output(client: openai.OpenAI, expected: list[str]) -> None:
    texts, reasons, usage = ["", ""], [None, None], None
    for part in client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}):
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == (expected, ["length", "length"])
    assert usage == client.completions.create(**GREEDY).usage


def test_every_answer_of_a_chat_is_that_of_the_conversation_alone(client: openai.OpenAI, model: Any) -> None:
    request: Any = {
        "model": "talker",
        "messages": [{"role": "user", "content": "who works?"}],
        "temperature": 0,
        "max_tokens": 9,
    }
    response = client.chat.completions.create(**request, n=2)
    text = model[1].apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
    main, turn = text[: -len("<s>assistant\n")], "<s>assistant\n"
    expected = pm.generate(*model, pm.Sample(main, [turn]), max_new_tokens=9) * 2
    assert [choice.message.content for choice in response.choices] == expected
    streamed = ["", ""]
    for part in client.chat.completions.create(**request, n=2, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected


def test_only_outputs_with_a_seed_repeat(client: openai.OpenAI) -> None:
    def texts(**seed: Any) -> list[str]:
        return [
            choice.text
            for choice in client.completions.create(**{**GREEDY, "temperature": 1.0, "n": 2, **seed}).choices
        ]

    assert texts(seed=7) == texts(seed=7)
    assert texts() != texts()
    assert len(set(texts(seed=7))) == 4


def test_logprobs_are_those_of_the_library(client: openai.OpenAI, model: Any) -> None:
    response = (
        client.completions.create(**{**GREEDY, "prompt": PROMPTS[0], "max_tokens": 4}, logprobs=3)
        .choices[0]
        .logprobs
    )
    events = list(pm.stream(*model, pm.Sample(branches=PROMPTS[:1]), max_new_tokens=4, logprobs=3))
    assert response is not None
    assert response.token_logprobs == pytest.approx([event.logprob for event in events], abs=1e-4)
    assert [len(top) for top in response.top_logprobs or []] == [3] * 4


def test_branches_have_settings_of_their_own_and_coordinates(shared_server: Server, model: Any) -> None:
    own = {
        **BRANCHES,
        "branches": [{"text": QUESTIONS[0], "max_tokens": 3}, {"text": QUESTIONS[1]}],
        "reduce": " so",
    }
    status, response = shared_server.post("/v1/branches", own)
    settings: list[dict[str, Any]] = [{"max_new_tokens": 3}, {}]
    expected = pm.generate(
        *model, pm.Sample(MAIN, QUESTIONS), per_branch=settings, reduce=" so", max_new_tokens=12
    )
    assert status == 200
    outputs = [*response["branches"], response["reduce"]]
    assert [output["text"] for output in outputs] == expected
    assert [len(output["tokens"]) for output in outputs] == [3, 12, 12]
    assert [output["branch"] for output in outputs] == [16, 32, 0]  # the reduce: as main


def test_a_running_sample_loses_one_branch_and_gains_another(shared_server: Server) -> None:
    sample, reasons, tokens = "", {}, dict[int, int]()
    for event in shared_server.stream("/v1/branches", {**BRANCHES, "max_tokens": 200}):
        if event == "[DONE]":
            break
        for delta in event.get("deltas", []):
            tokens[delta["index"]] = tokens.get(delta["index"], 0) + (delta["token"] is not None)
            reasons[delta["index"]] = delta["finish_reason"]
        if event["object"] == "branches.begun":
            sample = event["id"]
            assert (
                shared_server.post(f"/v1/branches/{sample}/branches", {"text": " when?", "max_tokens": 5})[0]
                == 201
            )
            assert shared_server.request("DELETE", f"/v1/branches/{sample}/branches/0").status == 204
    assert reasons == {0: "cancelled", 1: "length", 2: "length"}
    assert (tokens[1], tokens[2]) == (200, 5)
    assert tokens[0] < 200
    assert shared_server.request("DELETE", f"/v1/branches/{sample}").status == 404


def test_detokenize_inverts_tokenize(shared_server: Server) -> None:
    _, response = shared_server.post("/tokenize", {"prompt": PROMPTS[0]})
    assert response["count"] == len(response["tokens"])
    assert shared_server.post("/detokenize", {"tokens": response["tokens"]})[1] == {"prompt": PROMPTS[0]}


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
def test_an_error_has_openais_format(
    shared_server: Server, change: dict[str, Any], status: int, param: str, code: str
) -> None:
    response, body = shared_server.post("/v1/completions", {**GREEDY, **change})
    error = body["error"]
    assert (response, error["type"], error["param"], error["code"]) == (
        status,
        "invalid_request_error",
        param,
        code,
    )
    assert param is None or param in error["message"]
    assert "\n" not in error["message"]


def test_requests_beyond_max_requests_get_429(shared_server: Server) -> None:
    working = [
        shared_server.connect("POST", "/v1/completions", {**GREEDY, "max_tokens": 200}) for _ in range(16)
    ]
    deadline = time.monotonic() + 20
    while shared_server.metric("open_requests") <= 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    with shared_server.request("POST", "/v1/completions", GREEDY) as refused:
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert [connection.getresponse().status for connection in working] == [200] * 16
    assert shared_server.post("/v1/completions", GREEDY)[0] == 200


@pytest.mark.parametrize("late_s", [0, 0.1])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(shared_server: Server, stream: bool, late_s: float) -> None:
    """late_s: seconds between the headers and the body."""
    body = json.dumps({**GREEDY, "max_tokens": 400, "stream": stream}).encode()
    parts = (time.sleep(late_s) or body for _ in range(1))
    leaver = shared_server.connect("POST", "/v1/completions", parts, **{"content-length": str(len(body))})
    deadline = time.monotonic() + 20
    while not shared_server.metric("live_branches"):
        assert time.monotonic() < deadline
    leaver.close()
    left = time.monotonic()
    while shared_server.metric("live_branches"):
        assert time.monotonic() < left + 2
    assert shared_server.metric("open_requests") == 1  # the request for the metrics


def test_a_body_that_is_too_long_is_rejected(shared_server: Server) -> None:
    status, body = shared_server.post("/v1/completions", {**GREEDY, "prompt": "x" * 70000})
    assert (status, body["error"]["code"]) == (413, "too_large")


def test_metrics_and_health_are_served(shared_server: Server) -> None:
    assert shared_server.get("/health") == (200, {"status": "ok"})
    for name in (
        "requests_total",
        "time_to_first_token_seconds_count",
        "step_seconds_count",
        "cache_tokens",
        "tokens_total",
    ):
        assert shared_server.metric(name) > 0, name


def test_nothing_listens_beyond_this_machine(shared_server: Server) -> None:
    addresses = {ip for ip, _ in listening(psutil.Process(shared_server.process.pid))}
    assert addresses
    assert addresses <= LOOPBACK

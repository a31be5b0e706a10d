"""`python -m serving` as a user runs it: real Ray Serve on a loopback port, a tiny model, plain HTTP."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import parallelmind as pm
from serving.settings import AppConfig

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
STARTUP_S = 120
PROMPTS = ["the question is", " who works in the passage?"]
GREEDY = {"model": "tiny", "prompt": PROMPTS, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that never prefers the end-of-text token, so that an answer is as long as it may be."""
    folder = tmp_path_factory.mktemp("serving") / "tiny"
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module", autouse=True)
def server(base: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Afterwards Ctrl-C must end it cleanly, and all of its Ray with it."""
    log = Path(base).parent / "log"
    command = [sys.executable, "-m", "serving", f"base_model={base}", f"port={port}"]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for_greeting(process, log)
        yield process
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert psutil.wait_procs(family, timeout=30)[1] == []
        assert "Traceback" not in log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def expected(base: str) -> list[str]:
    model, tokenizer = pm.load_model_with_lora(base)
    return pm.generate(model, tokenizer, pm.Sample(branches=PROMPTS), max_new_tokens=24)


def test_health_and_models(port: int) -> None:
    assert get(port, "/health") == (200, {"status": "ok"})
    status, models = get(port, "/v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, ["tiny"])


def test_prompts_are_branches_of_one_sample(port: int, expected: list[str]) -> None:
    status, answer = post(port, GREEDY)
    assert status == 200
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 48
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_says_the_same(port: int, expected: list[str]) -> None:
    body = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    with opened(port, body) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.strip()]
    assert lines[-1] == "[DONE]"
    *parts, last = [json.loads(line) for line in lines[:-1]]
    texts, reasons = ["", ""], [None, None]
    for part in parts:
        (choice,) = part["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == expected
    assert reasons == ["length", "length"]
    assert len({part["id"] for part in parts}) == 1
    assert last["usage"] == post(port, GREEDY)[1]["usage"]


def test_a_seed_repeats_and_its_absence_does_not(port: int) -> None:
    sampled = {**GREEDY, "temperature": 1.0}
    once, again = (post(port, {**sampled, "seed": 7})[1]["choices"] for _ in range(2))
    assert once == again
    assert post(port, sampled)[1]["choices"] != post(port, sampled)[1]["choices"]


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"temperature": -1, "stream": True}, 400, "temperature", "invalid_value"),
        ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ({"max_tokens": 5000}, 400, "max_tokens", "invalid_value"),
        ({"prompt": ["a", ""]}, 400, "prompt", "invalid_value"),
        ({"n": 2}, 400, "n", "invalid_value"),
        ({"temprature": 1}, 400, "temprature", "unknown_parameter"),
        ({"model": "other"}, 404, "model", "model_not_found"),
    ],
)
def test_a_refusal_has_openais_shape(port: int, change: dict[str, Any], status: int, param: str, code: str) -> None:
    found, answer = post(port, {**GREEDY, **change})
    error = answer["error"]
    assert (found, error["type"], error["param"], error["code"]) == (status, "invalid_request_error", param, code)
    assert param in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_decoding(port: int, stream: bool) -> None:
    long = {**GREEDY, "max_tokens": 500}
    started = time.monotonic()
    assert post(port, long)[0] == 200
    whole = time.monotonic() - started

    leaver = _connect(port, "POST", "/v1/completions", json.dumps({**long, "stream": stream}))
    if stream:
        with leaver.getresponse() as response:
            response.readline()
    else:
        time.sleep(whole / 10)
    leaver.close()
    started = time.monotonic()
    assert post(port, {**GREEDY, "max_tokens": 1})[0] == 200
    assert time.monotonic() - started < whole / 2  # the model takes one sample at a time: it has dropped the long one


def test_nothing_listens_beyond_this_machine(server: subprocess.Popen[bytes], port: int) -> None:
    addresses = {
        connection.laddr.ip
        for process in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert addresses


@pytest.mark.parametrize(
    ("given", "message"),
    [({"lora_pat": "x"}, "lora_pat: unknown field .did you mean lora_path"), ({}, "lora_path: required and not given")],
)
def test_an_application_says_what_is_wrong_with_its_fields(given: dict[str, str], message: str) -> None:
    with pytest.raises(pm.UserError, match=message):
        AppConfig.of(given)


def get(port: int, path: str) -> tuple[int, Any]:
    return _answer(_request(port, "GET", path))


def post(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    return _answer(opened(port, body))


def opened(port: int, body: dict[str, Any]) -> http.client.HTTPResponse:
    return _request(port, "POST", "/v1/completions", json.dumps(body))


def _request(port: int, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
    return _connect(port, method, path, body).getresponse()


def _connect(port: int, method: str, path: str, body: str | None = None) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"content-type": "application/json", "connection": "close"})
    return connection


def _answer(response: http.client.HTTPResponse) -> tuple[int, Any]:
    with response:
        return response.status, json.load(response)


def _wait_for_greeting(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline and process.poll() is None:
        if "Ctrl-C" in log.read_text():
            return
        time.sleep(0.2)
    raise TimeoutError(f"no server after {STARTUP_S} s:\n{log.read_text()}")


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}

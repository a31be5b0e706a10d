"""Calls of all engines: they return what is known when an engine does not answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from asgi import Reply, make_ingress, post_json, send_request
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

import parallelmind as pm
from parallelmind.engine.sampling_params import SamplingParams
from serving.engine.messages import RejectedRequest
from serving.ingress import engine_client
from serving.observability.metrics import EngineMetrics

PARAMS = SamplingParams()


class Replica:
    """An engine that has some samples, or does not answer. keys: of the branches that were added."""

    def __init__(self, name: str, *samples: str, mute: bool = False) -> None:
        self.name, self.samples, self.mute = name, samples, mute
        self.keys: list[str] = []

    async def __call__(self, method: str, *args: Any) -> Any:
        if self.mute:
            await asyncio.Future()
        return getattr(self, method)(*args)

    def ping(self) -> None:
        return None

    def metrics(self) -> Any:
        return self.name, EngineMetrics(lambda: 0).families()

    def cancel(self, sample: str, branch: int | None) -> bool | None:
        return True if sample in self.samples else None

    def join(self, sample: str, segment: pm.Segment, branch: int | None, key: str) -> Any:
        if sample not in self.samples:
            return None
        self.keys.append(key)
        return RejectedRequest("text: too long") if len(segment.text) > 10 else [(7, "branches[7]")]


def replicas_answer(monkeypatch: pytest.MonkeyPatch, *replicas: Replica) -> None:
    async def broadcast(_: Any, method: str, *args: Any) -> list[Awaitable[Any]]:
        if not replicas:
            raise DeploymentUnavailableError(DeploymentID("EngineReplica"))
        return [replica(method, *args) for replica in replicas]

    monkeypatch.setattr(engine_client, "broadcast", broadcast)
    monkeypatch.setattr(engine_client, "_CONTROL_TIMEOUT_S", 0.05)


def send(folder: Path, method: str, path: str, **settings: Any) -> Reply:
    app = make_ingress(folder, **settings).__serve_build_asgi_app__()
    return asyncio.run(send_request(app, method, path))


def add(folder: Path, sample: str, **headers: str) -> Reply:
    app = make_ingress(folder).__serve_build_asgi_app__()
    return asyncio.run(post_json(app, f"/v1/branches/{sample}/branches", {"text": "who"}, **headers))


def test_a_branch_is_added_and_cancelled_while_another_engine_is_mute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Replica("a", "smp-1")
    replicas_answer(monkeypatch, Replica("b", mute=True), owner, Replica("c"))
    monkeypatch.setattr(engine_client, "_CONTROL_TIMEOUT_S", 1000)  # too long for the test to wait
    reply = add(tmp_path, "smp-1", **{"idempotency-key": "mine"})
    assert (reply.status, json.loads(reply.body)["index"], owner.keys) == (201, 7, ["mine"])
    add(tmp_path, "smp-1")
    add(tmp_path, "smp-1")
    assert len(set(owner.keys)) == 3
    assert send(tmp_path, "DELETE", "/v1/branches/smp-1").status == 204


def test_a_sample_that_a_mute_engine_may_have_is_not_called_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas_answer(monkeypatch, Replica("a"), Replica("b", mute=True))
    for reply in (add(tmp_path, "smp-1"), send(tmp_path, "DELETE", "/v1/branches/smp-1/branches/0")):
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (
            503,
            "engine_silent",
            "1",
        )
    replicas_answer(monkeypatch, Replica("a"), Replica("b"))
    assert send(tmp_path, "DELETE", "/v1/branches/smp-1").status == 404
    replicas_answer(monkeypatch)
    assert send(tmp_path, "DELETE", "/v1/branches/smp-1").status == 404


def test_metrics_have_a_line_for_an_engine_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas_answer(monkeypatch, Replica("a"), Replica("b", mute=True))
    reply = send(tmp_path, "GET", "/metrics")
    lines = [line for line in reply.body.decode().splitlines() if line.startswith("parallelmind_engine_up")]
    assert (reply.status, sorted(lines)) == (
        200,
        [
            'parallelmind_engine_up{process="a"} 1.0',
            'parallelmind_engine_up{process="silent-1"} 0.0',
        ],
    )


@pytest.mark.parametrize(
    ("mute", "fields", "status"),
    [([True, False], {}, 200), ([True, True], {}, 503), ([], {}, 503), ([], {"min_replicas": 0}, 200)],
)
def test_the_server_is_healthy_while_one_engine_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mute: list[bool], fields: Any, status: int
) -> None:
    replicas_answer(monkeypatch, *(Replica("a", mute=each) for each in mute))
    assert send(tmp_path, "GET", "/health", **fields).status == status

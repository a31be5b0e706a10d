"""The server on a cluster: deployed, updated under load, scaled by load, given a new adapter version."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from clusters import Application, bare_python, cluster, wait_until
from engines import ISOLATED, decode, saved_adapters, tiny_engine
from servers import Server

from parallelmind import tracking
from parallelmind.config import FrozenConfig
from parallelmind.engine.request import Sample

pytestmark = pytest.mark.slow
MAIN, QUESTIONS = "the passage says who works where.", [" who?", " where is the work?"]
OWN: list[dict[str, Any]] = [{"temperature": 1.0, "seed": 5}, {}]
BODY: dict[str, Any] = {
    "model": "base",
    "main": MAIN,
    "branches": [{"text": text, **own} for text, own in zip(QUESTIONS, OWN, strict=True)],
    "max_tokens": 200,
    "ignore_eos": True,
}
LONG = 600
BY_LOAD = {"min_replicas": 0, "max_replicas": 2, "branches_per_replica": 2, "idle_s": 2}
CHAMPION = "models:/demo@champion"
_PAUSE_S = 0.2
Outputs = list[list[int]]  # tokens of each branch


class EmptyConfig(FrozenConfig):
    """The configuration of a run without settings."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_adapters(tmp_path_factory.mktemp("operation"))


@pytest.fixture(scope="module")
def registry(folders: list[Path]) -> str:
    """URI of a model registry with the adapters as versions 1 and 2; version 1 is the champion."""
    uri = tracking.absolute_uri(f"sqlite:///{folders[0].parent / 'mlflow.db'}")
    for number, folder in enumerate(folders):
        run = tracking.Tracker.start(uri, "test", f"run{number}", EmptyConfig(), key=str(number))
        run.log_folder(folder, "adapter")
        tracking.register_model(uri, run.run_id, "adapter", "demo", ["champion", "challenger"][number])
    return uri


@pytest.fixture(scope="module")
def application(folders: list[Path], registry: str) -> Iterator[Application]:
    """The application with exactly two engines."""
    root = folders[0].parent
    python = bare_python(root / "bare")
    model = {
        "base_model": str(root / "base"),
        "visibility": "isolated",
        "mlflow_uri": registry,
        "refresh_s": 0.2,
    }
    with cluster(python, cpus=4, serves=True) as dashboard:
        deployed = Application(python, dashboard, root)
        deployed.deploy(**model, min_replicas=2, max_replicas=2)
        yield deployed


def expected_outputs(tokens: int, folder: Path | None = None) -> Outputs:
    """The outputs of an engine in this process, with an adapter or without."""
    engine = tiny_engine(ISOLATED)
    if folder is not None:
        engine.load_adapter("own", folder)
    name = None if folder is None else "own"
    return decode(
        engine, Sample(MAIN, QUESTIONS), per_branch=OWN, adapter=name, max_new_tokens=tokens, ignore_eos=True
    )


def outputs_of(server: Server, stream: bool = False, **changes: Any) -> Outputs:
    """The outputs of one request to the server."""
    body = {**BODY, **changes}
    if not stream:
        status, response = server.post("/v1/branches", body)
        assert status == 200, response
        return [branch["tokens"] for branch in response["branches"]]
    tokens, event = Outputs([[], []]), None
    for event in server.stream("/v1/branches", body):
        for delta in event.get("deltas", []) if isinstance(event, dict) else []:
            tokens[delta["index"]].append(delta["token"])
    assert event == "[DONE]"
    return tokens


@contextmanager
def load(server: Server, clients: int) -> Iterator[None]:
    """Send requests until the end of the block, every other one streamed; each must be answered."""
    expected, stopped = expected_outputs(BODY["max_tokens"]), Event()

    def send_requests() -> None:
        count = 0
        while count < 2 or not stopped.wait(_PAUSE_S):
            count += 1
            assert outputs_of(server, stream=count % 2 == 0) == expected

    with ThreadPoolExecutor(clients) as pool:
        running_clients = [pool.submit(send_requests) for _ in range(clients)]
        try:
            yield
        finally:
            stopped.set()
        for client in running_clients:
            client.result()


def test_serve_yaml_deploys_a_server(application: Application) -> None:
    body = {"model": "base", "prompt": ["the question is", " who?"], "max_tokens": 4, "temperature": 0}
    status, response = application.server.post("/v1/completions", body)
    assert (status, len(response["choices"])) == (200, 2)
    assert len(application.running("EngineReplica")) == 2


def test_a_new_adapter_version_serves_samples_that_start_after_it(
    application: Application, folders: list[Path], registry: str
) -> None:
    server, (first, second) = application.server, [expected_outputs(LONG, folder) for folder in folders]
    changes = {"model": CHAMPION, "max_tokens": LONG}
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(outputs_of, server, number % 2 == 0, **changes) for number in range(4)]
        wait_until(lambda: server.metric("live_branches") == 8)
        tracking.MlflowClient(registry).set_registered_model_alias("demo", "champion", "2")
        new = [tokens[:8] for tokens in second]
        assert new != [tokens[:8] for tokens in first]
        wait_until(lambda: outputs_of(server, **{**changes, "max_tokens": 8}) == new)
        assert not any(output.done() for output in running)
    assert [output.result() for output in running] == [first] * 4


@pytest.mark.full
def test_clients_do_not_notice_an_update_under_load(application: Application) -> None:
    with load(application.server, clients=4):
        application.deploy(**BY_LOAD)


@pytest.mark.full
def test_the_number_of_engines_follows_the_load(application: Application) -> None:
    def wait_for_engines(count: int) -> None:
        wait_until(lambda: len(application.running("EngineReplica")) == count)

    application.deploy(**BY_LOAD)
    for clients, engines in [(1, 1), (6, 2), (1, 1)]:
        with load(application.server, clients):
            wait_for_engines(engines)
    wait_for_engines(0)
    assert outputs_of(application.server) == expected_outputs(BODY["max_tokens"])
    wait_for_engines(0)

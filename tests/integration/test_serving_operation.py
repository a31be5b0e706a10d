"""The server in operation: deployed on a cluster, updated under load, scaled by load, given a new version of
an adapter.
"""

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
Said = list[list[int]]  # tokens of each branch


class Nothing(FrozenConfig):
    """A run without settings."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_adapters(tmp_path_factory.mktemp("operation"))


@pytest.fixture(scope="module")
def registry(folders: list[Path]) -> str:
    """Where the adapters are versions 1 and 2, and the first is the champion."""
    uri = tracking.absolute_uri(f"sqlite:///{folders[0].parent / 'mlflow.db'}")
    for number, folder in enumerate(folders):
        run = tracking.Tracker.start(uri, "test", f"run{number}", Nothing(), key=str(number))
        run.log_folder(folder, "adapter")
        tracking.register_model(uri, run.run_id, "adapter", "demo", ["champion", "challenger"][number])
    return uri


@pytest.fixture(scope="module")
def application(folders: list[Path], registry: str) -> Iterator[Application]:
    """Two engines, whatever the load."""
    root = folders[0].parent
    python = bare_python(root / "bare")
    model = {
        "base_model": str(root / "base"),
        "visibility": "isolated",
        "mlflow_uri": registry,
        "refresh_s": 0,
    }
    with cluster(python, cpus=4, serves=True) as dashboard:
        found = Application(python, dashboard, root)
        found.deploy(**model, min_replicas=2, max_replicas=2)
        yield found


def alone(tokens: int, folder: Path | None = None) -> Said:
    """What an engine of our own says, with an adapter or without."""
    engine = tiny_engine(ISOLATED)
    if folder is not None:
        engine.load_adapter("own", folder)
    name = None if folder is None else "own"
    return decode(
        engine, Sample(MAIN, QUESTIONS), per_branch=OWN, adapter=name, max_new_tokens=tokens, ignore_eos=True
    )


def said(server: Server, stream: bool = False, **changes: Any) -> Said:
    """What is answered, to the end."""
    body = {**BODY, **changes}
    if not stream:
        status, found = server.post("/v1/branches", body)
        assert status == 200, found
        return [branch["tokens"] for branch in found["branches"]]
    tokens, event = Said([[], []]), None
    for event in server.stream("/v1/branches", body):
        for delta in event.get("deltas", []) if isinstance(event, dict) else []:
            tokens[delta["index"]].append(delta["token"])
    assert event == "[DONE]"
    return tokens


@contextmanager
def load(server: Server, clients: int) -> Iterator[None]:
    """Clients that ask again and again until the end of the block, every other time for a stream; each must
    be answered.
    """
    expected, over = alone(BODY["max_tokens"]), Event()

    def ask() -> None:
        times = 0
        while times < 2 or not over.wait(_PAUSE_S):
            times += 1
            assert said(server, stream=times % 2 == 0) == expected

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            yield
        finally:
            over.set()
        for each in asking:
            each.result()


def test_the_file_for_a_cluster_gives_a_server(application: Application) -> None:
    body = {"model": "base", "prompt": ["the question is", " who?"], "max_tokens": 4, "temperature": 0}
    status, found = application.server.post("/v1/completions", body)
    assert (status, len(found["choices"])) == (200, 2)
    assert len(application.running("EngineReplica")) == 2


def test_a_new_version_serves_what_begins_after_it(
    application: Application, folders: list[Path], registry: str
) -> None:
    server, (first, second) = application.server, [alone(LONG, folder) for folder in folders]
    asked = {"model": CHAMPION, "max_tokens": LONG}
    with ThreadPoolExecutor(4) as pool:
        begun = [pool.submit(said, server, number % 2 == 0, **asked) for number in range(4)]
        wait_until(lambda: server.metric("live_branches") == 8)
        tracking.MlflowClient(registry).set_registered_model_alias("demo", "champion", "2")
        later = said(server, **{**asked, "max_tokens": 8})
        assert not any(each.done() for each in begun)
    assert [each.result() for each in begun] == [first] * 4
    assert later == [tokens[:8] for tokens in second] != [tokens[:8] for tokens in first]


def test_an_update_under_load_is_not_noticed(application: Application) -> None:
    with load(application.server, clients=4):
        application.deploy(**BY_LOAD)


def test_engines_come_and_go_with_the_load(application: Application) -> None:
    def wait_for_engines(count: int) -> None:
        wait_until(lambda: len(application.running("EngineReplica")) == count)

    application.deploy(**BY_LOAD)
    for clients, engines in [(1, 1), (6, 2), (1, 1)]:
        with load(application.server, clients):
            wait_for_engines(engines)
    wait_for_engines(0)
    assert said(application.server) == alone(BODY["max_tokens"])
    wait_for_engines(0)

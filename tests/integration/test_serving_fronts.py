"""Two ingress processes share the requests; one of them is killed while both stream."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from servers import Server, save_talker, serving

pytestmark = pytest.mark.slow
BODY: dict[str, Any] = {
    "model": "talker",
    "main": "the passage says who works where.",
    "branches": [{"text": " who?", "temperature": 1.0, "seed": 5}, {"text": " where is the work?"}],
    "reduce": " so",
    "max_tokens": 250,
    "stream": True,
}
STREAMS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fronts")
    base = save_talker(folder / "talker")
    with serving(folder / "server", complaints=True, base_model=base, num_fronts=2) as started:
        yield started


@dataclass
class Stream:
    """A client of one stream, which comes back with the id of the last event when it is cut off.

    cuts: the number of events at each time that it was cut off.
    """

    server: Server
    ids: list[str] = field(default_factory=list)
    data: list[Any] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)

    def read(self) -> None:
        deadline = time.monotonic() + 90
        while self.data[-1:] != ["[DONE]"]:
            assert time.monotonic() < deadline
            with suppress(OSError, http.client.HTTPException):
                self._read_until_cut_off()
            if self.ids and self.data[-1] != "[DONE]" and len(self.data) not in self.cuts:
                self.cuts.append(len(self.data))

    def _read_until_cut_off(self) -> None:
        headers = {"last-event-id": self.ids[-1]} if self.ids else {}
        with self.server.request("POST", "/v1/branches", BODY, **headers) as response:
            if response.status == 503:  # no ingress, or an engine, answers at this moment
                time.sleep(0.2)
                return
            assert response.status == 200, response.read()
            id = None
            for line in response:
                name, _, value = line.decode().strip().partition(": ")
                if name == "id":
                    id = value
                elif name == "data":
                    self.data.append(value if value == "[DONE]" else json.loads(value))
                    self.ids += [] if id is None else [id]
                    id = None

    @property
    def outputs(self) -> dict[int, tuple[str, list[int]]]:
        """Text and tokens of every branch."""
        texts, tokens = defaultdict[int, str](str), defaultdict[int, list[int]](list)
        for chunk in self.data[:-1]:
            for delta in chunk.get("deltas", []):
                texts[delta["index"]] += delta["text"]
                tokens[delta["index"]] += [] if delta["token"] is None else [delta["token"]]
        return {index: (texts[index], tokens[index]) for index in texts}


def by_front(server: Server, name: str, labels: str = "") -> Counter[str]:
    """The values of a metric by ingress process."""
    with server.request("GET", "/metrics") as response:
        text = response.read().decode()
    values = Counter[str]()
    for line in text.splitlines():
        if line.startswith(f"parallelmind_{name}{{") and labels in line:
            process = re.search(r'process="([^"]+)"', line)
            assert process
            values[process[1]] += round(float(line.split()[-1]))
    return values


def wait_for_fronts(server: Server, count: int = 2) -> None:
    """Until HAProxy passes requests on to all of them, which it does in turn while they are idle."""
    before, deadline = answered_by_front(server)[1], time.monotonic() + 90
    while len(answered_by_front(server)[1] - before) < count:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_loss_of_a_front_breaks_its_streams_only_and_those_are_resumed(server: Server) -> None:
    wait_for_fronts(server)
    alone = Stream(server)
    alone.read()
    assert alone.cuts == []
    assert [len(tokens) for _, tokens in alone.outputs.values()] == [250] * 3
    streams = [Stream(server) for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        readers = [pool.submit(stream.read) for stream in streams]
        while any(len(stream.data) < 10 for stream in streams):
            time.sleep(0.01)
        shares = by_front(server, "open_requests")  # and the request for the metrics
        server.family("Ingress")[0].kill()
        for reader in readers:
            reader.result()
    broken = [stream for stream in streams if stream.cuts]
    for stream in streams:
        assert stream.outputs == alone.outputs
        sample = stream.ids[0].partition(":")[0]
        assert stream.ids == [f"{sample}:{number}" for number in range(1, len(stream.ids) + 1)]
    assert 0 < len(broken) < STREAMS
    assert all(10 <= cut < len(stream.data) for stream in broken for cut in stream.cuts)
    wait_for_fronts(server)
    (lost,) = shares.keys() - by_front(server, "open_requests").keys()
    assert shares[lost] - 1 <= len(broken) <= shares[lost]
    assert sum(shares.values()) == STREAMS + 1
    assert server.metric("live_branches") == 0


def test_samples_are_changed_through_the_other_front(server: Server) -> None:
    """HAProxy prefers the front with fewer connections, which is the one without the stream."""
    wait_for_fronts(server)
    before, stream = answered_by_front(server), Stream(server)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(stream.read)
        while not stream.ids:
            time.sleep(0.01)
        route, added = f"/v1/branches/{stream.ids[0].partition(':')[0]}", []
        for key in ("one", "one", "two"):
            text = {"text": " when", "max_tokens": 3}
            status, place = server.post(f"{route}/branches", text, **{"idempotency-key": key})
            assert status == 201, place
            added.append(place["path"])
        statuses = [server.request("DELETE", path).status for path in (f"{route}/branches/0", route)]
        reader.result()
    assert (added, statuses) == (["branches[2]", "branches[2]", "branches[3]"], [204, 204])
    deltas = [delta for chunk in stream.data[:-1] for delta in chunk.get("deltas", [])]
    ends = {delta["index"]: delta["finish_reason"] for delta in deltas}
    assert ends[0] == ends[1] == "cancelled"
    of_streams, of_calls = (
        after - earlier for after, earlier in zip(answered_by_front(server), before, strict=True)
    )
    (own,) = of_streams
    assert of_calls.total() - of_calls[own] >= 5  # and not a request for the metrics


def answered_by_front(server: Server) -> list[Counter[str]]:
    """Requests that each front has answered: streams, and others."""
    return [by_front(server, "requests_total", f'route="{route}"') for route in ("/v1/branches", "other")]

"""The cursor: whoever takes batches, and wherever they stop, what is left is exactly what was not taken."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from parallelmind.config import DataConfig
from parallelmind.data import batch_server as feeding
from parallelmind.data.batch_server import BatchServer, ShardAssignment
from parallelmind.data.packing import SampleBatch
from parallelmind.data.records import parse_line
from parallelmind.data.tables import to_table
from parallelmind.data.tokenise import tokenise

CONFIG = DataConfig(data_path="-", shuffle_window=8, batch_size=2, max_branches_per_sample=3, length_window=2)
RECORDS = [
    parse_line(json.dumps({"text": f"record {number} " + "who " * (number % 7)}).encode())
    for number in range(60)
]
DONE = tokenise(RECORDS, tiny_tokenizer(), CONFIG)
TABLES = [to_table((done, True) for done in DONE[at : at + 13]) for at in range(0, len(DONE), 13)]


def feeder() -> BatchServer:
    return BatchServer(lambda: iter(TABLES), CONFIG, seed=3)


def take(source: BatchServer, first: int, workers: int, rounds: int | None = None) -> list[list[bytes]]:
    """What all workers together take from `first` on, in turns, for some rounds or to the end."""
    taken = []
    open_ranks = list(range(workers))
    while open_ranks and (rounds is None or rounds > 0):
        for rank in list(open_ranks):
            found = source.next(ShardAssignment("", 0, first, workers), rank)
            if isinstance(found, SampleBatch):
                taken.append([sample.ids.tobytes() for sample in found.samples])
            else:
                open_ranks.remove(rank)
        rounds = None if rounds is None else rounds - 1
    return taken


def exhaust(
    source: BatchServer, workers: int, rank: int, group: str = "", begun: threading.Event | None = None
) -> None:
    while isinstance(source.next(ShardAssignment(group, 0, 0, workers), rank), SampleBatch):
        if begun:
            begun.set()


EVERYTHING = take(feeder(), 0, 1)


def test_every_record_is_in_exactly_one_batch() -> None:
    texts: Counter[bytes] = Counter()
    source = feeder()
    while isinstance(group := source.next(ShardAssignment("", 0, 0, 1), 0), SampleBatch):
        for sample in group.samples:
            ends = sample.lengths.cumsum()
            texts.update(sample.ids[a:b].tobytes() for a, b in pairwise(ends))
    assert sum(texts.values()) == len(RECORDS)
    assert set(texts.values()) == {1}
    assert group["skipped"] == 0


@given(rounds=st.integers(0, 12), before=st.integers(1, 4), after=st.integers(1, 4))
def test_a_restart_on_any_number_of_workers_goes_on_with_the_rest(
    rounds: int, before: int, after: int
) -> None:
    taken = take(feeder(), 0, before, rounds)
    assert taken == EVERYTHING[: len(taken)]
    assert taken + take(feeder(), len(taken), after) == EVERYTHING


def test_a_new_run_of_the_same_feeder_starts_where_it_is_told() -> None:
    source = feeder()
    take(source, 0, 2, 3)
    assert take(source, 6, 1) == EVERYTHING[6:]
    epoch = source.next(ShardAssignment("", 1, 0, 1), 0)
    assert isinstance(epoch, SampleBatch)
    assert [sample.ids.tobytes() for sample in epoch.samples] != EVERYTHING[0]


def test_workers_that_start_again_get_the_same_batches_again() -> None:
    """The same turns, by another group: what the lost one had taken is given out once more, and its waiters
    let go.
    """
    source = feeder()
    lost, new = ShardAssignment("lost", 0, 0, 2), ShardAssignment("new", 0, 0, 2)
    waiting = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(exhaust, source, 2, 1, "lost", waiting)
        assert waiting.wait(30)
        first = source.next(new, 0)
        assert isinstance(first, SampleBatch)
        assert first.samples[0].ids.tobytes() == EVERYTHING[0][0]
        with pytest.raises(RuntimeError, match="over"):
            taken.result(timeout=30)
    with pytest.raises(RuntimeError, match="over"):  # also those who come late
        source.next(lost, 0)
    second = source.next(new, 1)
    assert isinstance(second, SampleBatch)
    assert second.samples[0].ids.tobytes() == EVERYTHING[1][0]


@pytest.mark.parametrize(("room", "reads"), [(1 << 20, 1), (100, 3)])
def test_small_data_is_read_once_for_all_epochs(
    monkeypatch: pytest.MonkeyPatch, room: int, reads: int
) -> None:
    monkeypatch.setattr(feeding, "_KEPT", room)
    begun = []

    def read():
        begun.append(1)
        return iter(TABLES)

    source = BatchServer(read, CONFIG, seed=3)
    for epoch in range(3):
        sizes = 0
        while isinstance(group := source.next(ShardAssignment("", epoch, 0, 1), 0), SampleBatch):
            sizes += sum(sample.branches for sample in group.samples)
        assert sizes == len(RECORDS)
    assert len(begun) == reads


def test_what_the_reading_raises_reaches_every_worker() -> None:
    def broken():
        yield TABLES[0]
        raise OSError("disk gone")

    source = BatchServer(broken, CONFIG, seed=3)
    for rank in range(2):
        with pytest.raises(OSError, match="disk gone"):
            exhaust(source, 2, rank)

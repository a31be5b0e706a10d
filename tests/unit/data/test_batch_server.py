"""The batches that remain are exactly those not taken, whichever workers took the others."""

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
from parallelmind.data import batch_server as batch_server_module
from parallelmind.data.batch_server import BatchServer, ShardAssignment
from parallelmind.data.packing import SampleBatch
from parallelmind.data.record_parser import parse_line
from parallelmind.data.tables import to_table
from parallelmind.data.tokenise import tokenise

CONFIG = DataConfig(data_path="-", shuffle_window=8, batch_size=2, max_branches_per_sample=3, length_window=2)
RECORDS = [
    parse_line(json.dumps({"text": f"record {number} " + "who " * (number % 7)}).encode())
    for number in range(60)
]
TOKENISED = tokenise(RECORDS, tiny_tokenizer(), CONFIG)
TABLES = [to_table(TOKENISED[at : at + 13]) for at in range(0, len(TOKENISED), 13)]


def batch_server() -> BatchServer:
    return BatchServer(lambda: iter(TABLES), CONFIG, seed=3)


def take(server: BatchServer, first: int, workers: int, rounds: int | None = None) -> list[list[bytes]]:
    """Batches that all workers take in turns, from batch `first` on, for some rounds or to the end."""
    taken = []
    open_ranks = list(range(workers))
    while open_ranks and (rounds is None or rounds > 0):
        for rank in list(open_ranks):
            item = server.next_batch(ShardAssignment("", 0, first, workers, workers), rank)
            if isinstance(item, SampleBatch):
                taken.append([sample.ids.tobytes() for sample in item.samples])
            else:
                open_ranks.remove(rank)
        rounds = None if rounds is None else rounds - 1
    return taken


def steps(workers: int, first: int = 0) -> list[list[bytes]]:
    """The batches of every optimizer step of four batches, from batch `first` on, in the order of batches."""
    server, result = batch_server(), []
    assignment = ShardAssignment("", 0, first, workers, batches_per_step=4)
    ranks = [number % workers for number in range(4)]
    while ranks:
        step = []
        for rank in list(ranks):
            if rank in ranks:
                item = server.next_batch(assignment, rank)
                if isinstance(item, SampleBatch):
                    step.append(b"".join(sample.ids.tobytes() for sample in item.samples))
                else:
                    ranks = [other for other in ranks if other != rank]
        result.append(step)
    return [step for step in result if step]


def take_all(
    server: BatchServer, workers: int, rank: int, group: str = "", started: threading.Event | None = None
) -> None:
    while isinstance(server.next_batch(ShardAssignment(group, 0, 0, workers, workers), rank), SampleBatch):
        if started:
            started.set()


ALL_BATCHES = take(batch_server(), 0, 1)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_any_number_of_workers_takes_the_same_batches_in_each_step(workers: int) -> None:
    """Three workers do not divide four batches: one of them takes two, as after the loss of a worker."""
    alone = steps(workers=1)
    assert [len(step) for step in alone[:-1]] == [4] * (len(alone) - 1)
    assert steps(workers) == alone
    assert steps(workers, first=8) == alone[2:]


def test_every_record_is_in_exactly_one_batch() -> None:
    texts: Counter[bytes] = Counter()
    server = batch_server()
    while isinstance(batch := server.next_batch(ShardAssignment("", 0, 0, 1, 1), 0), SampleBatch):
        for sample in batch.samples:
            ends = sample.lengths.cumsum()
            texts.update(sample.ids[a:b].tobytes() for a, b in pairwise(ends))
    assert sum(texts.values()) == len(RECORDS)
    assert set(texts.values()) == {1}
    assert batch["skipped"] == 0


@given(rounds=st.integers(0, 12), before=st.integers(1, 4), after=st.integers(1, 4))
def test_restart_on_any_number_of_workers_continues_with_the_rest(
    rounds: int, before: int, after: int
) -> None:
    taken = take(batch_server(), 0, before, rounds)
    assert taken == ALL_BATCHES[: len(taken)]
    assert taken + take(batch_server(), len(taken), after) == ALL_BATCHES


def test_new_assignment_of_the_same_server_starts_at_its_first_batch() -> None:
    server = batch_server()
    take(server, 0, 2, 3)
    assert take(server, 6, 1) == ALL_BATCHES[6:]
    epoch = server.next_batch(ShardAssignment("", 1, 0, 1, 1), 0)
    assert isinstance(epoch, SampleBatch)
    assert [sample.ids.tobytes() for sample in epoch.samples] != ALL_BATCHES[0]


def test_restarted_workers_get_the_same_batches_again() -> None:
    """Batches that a lost worker group took are served again, and its waiting calls end."""
    server = batch_server()
    lost, new = ShardAssignment("lost", 0, 0, 2, 2), ShardAssignment("new", 0, 0, 2, 2)
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take_all, server, 2, 1, "lost", started)
        assert started.wait(30)
        first = server.next_batch(new, 0)
        assert isinstance(first, SampleBatch)
        assert first.samples[0].ids.tobytes() == ALL_BATCHES[0][0]
        with pytest.raises(RuntimeError, match="other workers have started"):
            taken.result(timeout=30)
    with pytest.raises(RuntimeError, match="other workers have started"):  # a late call also ends
        server.next_batch(lost, 0)
    second = server.next_batch(new, 1)
    assert isinstance(second, SampleBatch)
    assert second.samples[0].ids.tobytes() == ALL_BATCHES[1][0]


@pytest.mark.parametrize(("room", "reads"), [(1 << 20, 1), (100, 3)])
def test_small_data_is_read_once_for_all_epochs(
    monkeypatch: pytest.MonkeyPatch, room: int, reads: int
) -> None:
    monkeypatch.setattr(batch_server_module, "_CACHE_BYTES", room)
    reads_started = []

    def read():
        reads_started.append(1)
        return iter(TABLES)

    server = BatchServer(read, CONFIG, seed=3)
    for epoch in range(3):
        branches = 0
        while isinstance(batch := server.next_batch(ShardAssignment("", epoch, 0, 1, 1), 0), SampleBatch):
            branches += sum(sample.branches for sample in batch.samples)
        assert branches == len(RECORDS)
    assert len(reads_started) == reads


def test_error_of_reading_reaches_every_worker() -> None:
    def broken():
        yield TABLES[0]
        raise OSError("disk gone")

    server = BatchServer(broken, CONFIG, seed=3)
    for rank in range(2):
        with pytest.raises(OSError, match="disk gone"):
            take_all(server, 2, rank)

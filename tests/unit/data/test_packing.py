"""Packing, shuffling and batching lose nothing and are repeatable."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import Segment
from trees import TREES, tokens_of

from parallelmind.config import DataConfig, RopeConfig
from parallelmind.data.held_out import HeldOut, regroup_branches
from parallelmind.data.packing import (
    EpochSeed,
    TokenRecord,
    batch,
    make_batch,
    merge,
    pack,
    sample_batches,
    shuffle,
    split,
)
from parallelmind.data.tables import from_tables, to_table
from parallelmind.data.tokenise import TokenisedRecord
from parallelmind.layout import IGNORE, PADDING, Tokens
from parallelmind.tree import Mask, Tree, context_lengths, divide, with_context

ROPE = RopeConfig()


def config(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"data_path": "-", **settings})


def standalone_records(count: int) -> list[TokenRecord]:
    return [
        TokenRecord(Tokens.of([], [[10 + i, 1000 + i, 2000 + i][: 2 + i % 2]]), standalone=True)
        for i in range(count)
    ]


def record_with_main(branches: int, main: int = 3) -> TokenRecord:
    return TokenRecord(
        Tokens.of([7] * main, [[100 + i] * (2 + i) for i in range(branches)], range(branches)),
        standalone=False,
    )


def contents(samples: list[Tokens]) -> Counter[tuple[int, ...]]:
    """How often each branch occurs in the samples."""
    branches: Counter[tuple[int, ...]] = Counter()
    for sample in samples:
        branches.update(
            tuple(part.tolist()) for part in np.split(sample.ids, np.cumsum(sample.lengths)[:-1])[1:]
        )
    return branches


def test_last_group_of_fixed_size_may_be_smaller() -> None:
    samples = list(pack(standalone_records(10), config(branches_per_sample=4), np.random.default_rng(0)))
    assert [sample.branches for sample in samples] == [4, 4, 2]
    assert contents(samples) == contents([record.tokens for record in standalone_records(10)])


@given(
    count=st.integers(0, 60),
    low=st.integers(1, 4),
    extra=st.integers(0, 4),
    limit=st.integers(4, 30),
    seed=st.integers(0, 9),
)
def test_random_groups_keep_every_record_within_the_limits(
    count: int, low: int, extra: int, limit: int, seed: int
) -> None:
    settings = config(
        min_branches_per_sample=low, max_branches_per_sample=low + extra, max_sample_tokens=limit
    )
    samples = list(pack(standalone_records(count), settings, np.random.default_rng(seed)))
    assert contents(samples) == contents([record.tokens for record in standalone_records(count)])
    assert all(sample.branches <= low + extra and len(sample.ids) <= limit for sample in samples)


def test_records_keep_their_branches_and_repeat_main_when_split() -> None:
    tokens = record_with_main(5).tokens
    pieces = list(split(tokens, max_branches=2, max_tokens=100))
    assert [piece.branches for piece in pieces] == [2, 2, 1]
    assert all(piece.ids[:3].tolist() == [7, 7, 7] for piece in pieces)
    targets = [piece.targets[3:] for piece in pieces]
    assert np.concatenate(targets).tolist() == tokens.targets[3:].tolist()
    assert contents(pieces) == contents([tokens])
    assert all(len(piece.ids) <= 10 for piece in split(tokens, max_branches=8, max_tokens=10))


def test_documents_are_no_branches_of_the_limit_and_stay_together() -> None:
    documents, questions = 4, 5
    reduce = 1 + documents
    parents = np.array([-1, *[0] * documents, 0, *[reduce] * questions])
    tree = Tree(parents, np.arange(len(parents)) == reduce, documents)
    lengths = [1, *range(2, 2 + documents), 1, *[3] * questions]
    targets = np.repeat(np.arange(len(parents)) > reduce, lengths)
    tokens = Tokens(np.arange(sum(lengths)), np.array(lengths), targets, tree)
    (whole,) = split(tokens, max_branches=questions, max_tokens=100)
    assert whole is tokens
    pieces = list(split(tokens, max_branches=2, max_tokens=100))
    kept = [(piece.tree.documents, piece.branches - documents) for piece in pieces]
    assert kept == [(4, 2), (4, 2), (4, 1)]


def test_targets_of_any_tokens_survive_every_grouping() -> None:
    targets = [[False, True, False, True], [False, False, True], [False, True]]
    tokens = Tokens.of([7], [[5] * len(mask) for mask in targets], targets=targets)
    table = to_table([TokenisedRecord(tokens, False, 0, 0), TokenisedRecord(None, False, 0, 1)])
    (record,) = from_tables([table], Counter())
    single = list(split(record.tokens, 1, 100))
    assert [piece.targets[1:].tolist() for piece in single] == targets
    without_main = [Tokens.of([], [[5] * len(mask)], targets=[mask]) for mask in targets]
    assert merge(without_main).targets.tolist() == list(chain.from_iterable(targets))


def test_shuffle_keeps_records_and_window_one_keeps_order() -> None:
    records = standalone_records(50)
    order = [id(record) for record in records]
    assert [id(record) for record in shuffle(records, 1, np.random.default_rng(0))] == order
    shuffled = [id(record) for record in shuffle(records, 16, np.random.default_rng(0))]
    assert shuffled != order
    assert sorted(shuffled) == sorted(order)


def make_batches(samples: list[Tokens], **settings: object) -> list[list[Tokens]]:
    return list(batch(samples, config(**settings), np.random.default_rng(0)))


def test_batches_by_samples_by_branches_and_by_tokens() -> None:
    samples = [record_with_main(count).tokens for count in (3, 1, 2, 5, 1)]
    assert [len(group) for group in make_batches(samples, batch_size=2, length_window=1)] == [2, 2, 1]
    by_branches = make_batches(samples, batch_size=4, batch_by_samples=False, length_window=1)
    assert [[sample.branches for sample in group] for group in by_branches] == [[3, 1], [2], [5], [1]]
    by_tokens = make_batches(samples, batch_tokens=24, length_window=1)
    assert [[len(sample.ids) for sample in group] for group in by_tokens] == [[12, 5], [8], [23], [5]]


lengths = st.lists(st.integers(2, 60), max_size=80)


@given(lengths=lengths, tokens=st.integers(60, 200), window=st.integers(1, 5), seed=st.integers(0, 5))
def test_a_token_budget_is_kept_and_nothing_is_lost(
    lengths: list[int], tokens: int, window: int, seed: int
) -> None:
    samples = [Tokens.of([], [[number] * length]) for number, length in enumerate(lengths)]
    settings = config(batch_tokens=tokens, length_window=window)
    batches = list(batch(samples, settings, np.random.default_rng(seed)))
    assert all(len(group) * max(len(sample.ids) for sample in group) <= tokens for group in batches)
    assert contents([sample for group in batches for sample in group]) == contents(samples)


@pytest.mark.parametrize("budget", [{}, {"batch_tokens": 2000}], ids=["size", "tokens"])
def test_samples_of_similar_length_share_a_batch(budget: dict[str, int]) -> None:
    generator = np.random.default_rng(0)
    samples = [
        Tokens.of([], [[1] * int(length)]) for length in generator.lognormal(4, 0.8, 2000).clip(2, 500)
    ]

    def padding(window: int) -> float:
        batches = [
            make_batch(group, ROPE, 0) for group in make_batches(samples, length_window=window, **budget)
        ]
        return 1 - sum(batch.tokens for batch in batches) / sum(batch.ids.size for batch in batches)

    assert padding(32) < 0.1 < padding(1)


@pytest.mark.parametrize("other", [EpochSeed(1), EpochSeed(0, epoch=1)])
def test_batches_depend_on_seed_and_epoch_alone(other: EpochSeed) -> None:
    settings = config(random_time_offset=5, max_branches_per_sample=4)

    def ids(seed: EpochSeed) -> list[list[object]]:
        batches = [group.collate(ROPE, 0) for group in sample_batches(standalone_records(40), settings, seed)]
        return [batch.pos2d.tolist() + batch.ids.tolist() for batch in batches]

    assert ids(EpochSeed(0)) == ids(EpochSeed(0))
    assert ids(EpochSeed(0)) != ids(other)


def test_delays_start_branches_late_within_the_limit() -> None:
    settings = config(random_time_offset=5, branches_per_sample=4, shuffle_window=1)
    batches = [
        group.collate(ROPE, 0) for group in sample_batches(standalone_records(40), settings, EpochSeed(0))
    ]
    starts = [
        int(batch.pos2d[row, batch.segment[row] == branch, 1].min())
        for batch in batches
        for row in range(len(batch.ids))
        for branch in range(1, 5)
    ]
    assert set(starts) == set(range(6))


def test_make_batch_pads() -> None:
    batch = make_batch([record_with_main(1).tokens, record_with_main(2).tokens], ROPE, pad_id=9)
    assert batch.ids.shape == (2, 8)
    assert (batch.ids[0, 5:] == 9).all()
    assert (batch.segment[0, 5:] == PADDING).all()
    assert (batch.labels[0, 5:] == IGNORE).all()


def test_regrouping_keeps_the_same_text_at_every_branch_count() -> None:
    records = [*standalone_records(9), record_with_main(5), *standalone_records(4)]
    samples = {n: regroup_branches(records, n, pool=12, data=config()) for n in (1, 2, 4, 16)}
    assert all(contents(regrouped) == contents(samples[1]) for regrouped in samples.values())
    assert sum(contents(samples[1]).values()) == 12
    assert max(sample.branches for sample in samples[4]) == 4


def test_dividing_many_branches_is_linear_in_their_number() -> None:
    divided = list(divide([3] * 5001, Tree.flat(5000), max_branches=1, max_tokens=100))
    assert len(divided) == 5000
    assert sum(map(len, divided)) == 2 * 5000  # main and the branch


def tree_record(root: Segment) -> TokenRecord:
    """A record whose token ids are all different, without the segments that `tokenise` would skip."""
    tokens = tokens_of(root)
    has_target = np.array([part.any() for part in np.split(tokens.targets, np.cumsum(tokens.lengths)[:-1])])
    kept = with_context(has_target, tokens.tree)
    kept[0] = True
    numbered = Tokens(np.arange(len(tokens.ids)), tokens.lengths, tokens.targets, tokens.tree)
    return TokenRecord(numbered.take(np.flatnonzero(kept)), standalone=False)


def reads_of(tokens: Tokens) -> dict[tuple[int, ...], list[int]]:
    """By the ids of a segment, the ids that its tokens may read on its path and of what it joins."""
    parts, reads = tokens.split(), {}
    for number, part in enumerate(parts):
        chosen: Mask = np.arange(len(parts)) == number
        reads[tuple(part)] = tokens.take(np.flatnonzero(with_context(chosen, tokens.tree))).ids.tolist()
    return reads


def target_ids(samples: list[Tokens]) -> Counter[int]:
    return Counter(chain.from_iterable(sample.ids[sample.targets].tolist() for sample in samples))


@given(root=TREES, max_branches=st.integers(1, 6), max_tokens=st.integers(4, 40))
def test_every_target_of_a_tree_is_one_once_beside_all_that_it_reads(
    root: Segment, max_branches: int, max_tokens: int
) -> None:
    tokens = tree_record(root).tokens
    pieces = list(split(tokens, max_branches, max_tokens))
    assert target_ids(pieces) == target_ids([tokens])
    whole = reads_of(tokens)
    contexts = context_lengths(tokens.lengths.tolist(), tokens.tree)
    for piece in pieces:
        reads = reads_of(piece)
        assert all(whole[part] == read for part, read in reads.items())
        fits = piece.branches <= max_branches and len(piece.ids) <= max_tokens
        assert fits or max(map(len, reads.values())) == len(piece.ids)  # what one segment reads
    assert max(contexts) <= max(len(piece.ids) for piece in pieces)


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12),
    main=st.integers(0, 6),
    max_branches=st.integers(1, 5),
    max_tokens=st.integers(15, 40),
)
def test_flat_records_are_split_greedily(
    lengths: list[int], main: int, max_branches: int, max_tokens: int
) -> None:
    branches = [[number] * length for number, length in enumerate(lengths)]
    expected: list[list[list[int]]] = [[]]
    for branch in branches:
        room = max_tokens - main - sum(map(len, expected[-1])) - len(branch)
        if expected[-1] and (len(expected[-1]) == max_branches or room < 0):
            expected.append([])
        expected[-1].append(branch)
    pieces = list(split(Tokens.of([99] * main, branches), max_branches, max_tokens))
    assert [piece.split() for piece in pieces] == [[[99] * main, *part] for part in expected]
    assert all(
        piece.tree.is_flat and piece.targets.sum() + piece.branches + main == len(piece.ids)
        for piece in pieces
    )


@given(roots=st.lists(TREES, min_size=1, max_size=4), pool=st.integers(1, 12))
def test_held_out_trees_have_the_same_targets_at_every_branch_count(roots: list[Segment], pool: int) -> None:
    records = [record for root in roots if (record := tree_record(root)).tokens.branches]
    held_out = HeldOut([*standalone_records(3), *records], pool, config(), 0, 0)
    samples = {n: list(chain.from_iterable(held_out.batches(n, seed=0))) for n in (1, 2, 4, 16)}
    assert all(target_ids(found) == target_ids(samples[1]) for found in samples.values())
    assert sum(sample.branches for sample in samples[16]) >= held_out.branches


def test_delays_are_drawn_for_the_branches_of_a_tree() -> None:
    root: Segment = {
        "tokens": [1, 2],
        "branches": [{"tokens": [3, 4], "offset": 1, "branches": [{"tokens": [5, 6], "offset": 0}] * 2}],
        "reduce": {"tokens": [7, 8], "offset": 0},
    }
    root["branches"][0]["branches"] = [dict(below) for below in root["branches"][0]["branches"]]
    record = TokenRecord(tokens_of(root), standalone=False)
    settings = config(random_time_offset=5)
    starts = set()
    for batch_of_one in sample_batches([record] * 200, settings, EpochSeed(0)):
        batch = batch_of_one.collate(ROPE, 0)
        for row in range(len(batch.ids)):
            start = [int(batch.pos2d[row, batch.segment[row] == number, 1].min()) for number in range(5)]
            end = [time + 2 for time in start]
            assert start[4] == max(end[1:4])
            starts.add((start[1] - end[0], start[2] - end[1], start[3] - end[1]))
    assert {max(delays) for delays in starts} <= set(range(6))
    assert all({delays[place] for delays in starts} == set(range(6)) for place in range(3))


@given(roots=st.lists(TREES, max_size=5))
def test_trees_survive_the_table_that_passes_them_between_processes(roots: list[Segment]) -> None:
    flat = standalone_records(1)[0].tokens
    tokens = [tokens_of(root) for root in roots]
    for samples in (tokens, [flat, *tokens, flat]):
        table = to_table([TokenisedRecord(sample, False, 1, 2) for sample in samples])
        counts: Counter[str] = Counter()
        records = list(from_tables([table.slice(0, 1), table.slice(1)], counts))
        assert counts == ({"truncated": len(samples), "skipped": 2 * len(samples)} if samples else {})
        for record, sample in zip(records, samples, strict=True):
            assert record.tokens.split() == sample.split()
            assert record.tokens.targets.tolist() == sample.targets.tolist()
            assert record.tokens.tree.parents.tolist() == sample.tree.parents.tolist()
            assert record.tokens.tree.is_reduce.tolist() == sample.tree.is_reduce.tolist()

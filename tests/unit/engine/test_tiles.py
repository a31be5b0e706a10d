"""Tiles hold every pair of a token and a table that it reads, and the slots of tables; buffers hold tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import COLUMNAR, ISOLATED, observe, tiny_engine

from parallelmind.config import RopeConfig
from parallelmind.engine.batch import ModelInput
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.request import Sample, Segment
from parallelmind.engine.step_buffers import Bucket, StepBuffers
from parallelmind.engine.tiles import NO_PART, TILE, Tiles

MAIN = list(range(50, 90))
TREE = Segment([5, 6], [[7], [8, 9]], reduce=[10, 11], sampling={"max_new_tokens": 2})
BRANCHES = [[20 + index] for index in range(2 * TILE + 3)]


def recorded(config: RopeConfig) -> list[tuple[ModelInput, Tiles, list]]:
    """Steps with prompts of any length, more branches than a tile has, a tree and its reduce."""
    engine = tiny_engine(config, max_prefill_tokens=50)
    steps: list[tuple[ModelInput, Tiles, list]] = []
    observe(engine, lambda inputs, *_: steps.append((inputs, Tiles.of(inputs), inputs.segments)))
    settings = {"max_new_tokens": 3, "ignore_eos": True}
    engine.submit(Sample(MAIN, BRANCHES), **settings)
    engine.submit(Sample(MAIN[:20], [TREE, [3]], reduce=[4]), **settings)
    engine.submit(Sample([], [[9] * 33]), **settings)
    while engine.busy:
        engine.step()
    return steps


def slots_of(tiles: Tiles, tile: int) -> list[int]:
    return [
        slot
        for block, filled in zip(tiles.blocks[tile], tiles.filled[tile], strict=True)
        for slot in range(BLOCK * block, BLOCK * block + filled)
    ]


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
def test_the_parts_of_a_token_are_the_keys_that_its_spans_name(config: RopeConfig) -> None:
    num_parts = set()
    for inputs, tiles, segments in recorded(config):
        expected = [list[int]() for _ in inputs.ids]
        for segment in segments:
            for token in segment.query_indices:
                expected[token] += segment.keys.slots.tolist()
        assert tiles.blocks.shape[1] == tiles.num_blocks.max()
        for token, parts in enumerate(tiles.parts):
            rows = parts[parts != NO_PART]
            assert (tiles.queries.ravel()[rows] == token).all()
            slots = [slot for row in rows for slot in slots_of(tiles, row // TILE)]
            assert sorted(slots) == sorted(expected[token])
            num_parts.add(len(rows))
    assert max(num_parts) > 3 if config is ISOLATED else num_parts == {1}


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
def test_a_used_buffer_holds_the_step_and_padding_that_nothing_reads(config: RopeConfig) -> None:
    """A bucket's buffer is filled again and again. Sizes of all buckets are few."""
    scratch_block, buffers = 999, dict[Bucket, StepBuffers]()
    for inputs, tiles, _ in recorded(config):
        bucket = Bucket.of(inputs, tiles)
        scratch = BLOCK * scratch_block, scratch_block
        own = buffers.setdefault(bucket, StepBuffers(bucket, torch.device("cpu"), *scratch))
        own.send(inputs.padded(bucket.tokens, bucket.sampled), tiles)
        tokens, count, width = len(inputs.ids), *tiles.blocks.shape
        assert count < bucket.tiles, "the last tile is padding"
        columns = own.columns[:, :tokens].tolist()
        assert columns == [
            values.tolist()
            for values in (inputs.ids, inputs.branch, inputs.time, inputs.position, inputs.slots)
        ]
        assert own.sampled.tolist()[: len(inputs.logits_indices)] == inputs.logits_indices.tolist()
        assert set(own.columns[4, tokens:].tolist()) <= {BLOCK * scratch_block}
        assert not own.filled[count:].any()
        assert not own.filled[:, width:].any()
        assert own.num_blocks.tolist() == [*tiles.num_blocks.tolist(), *[0] * (bucket.tiles - count)]
        is_used = torch.arange(bucket.width) < own.num_blocks[:, None]
        assert set(own.blocks[~is_used].tolist()) == {scratch_block}
        assert own.blocks[is_used].tolist() == tiles.blocks[is_used[:count, :width].numpy()].tolist()
        no_part = own.parts // TILE == bucket.tiles - 1
        assert no_part[:tokens, : tiles.parts.shape[1]].tolist() == (tiles.parts == NO_PART).tolist()
        assert no_part[tokens:].all()
        if config is COLUMNAR:
            for tile, span in enumerate(tiles.span):
                table = inputs.spans.scores[inputs.spans.score[span]]
                start, length = int(own.score_start[tile]), int(own.score_width[tile])
                assert np.array_equal(own.scores[start : start + length**2], table.ravel())
            assert own.scores[0] == 0
    assert len(buffers) <= 9


def test_sizes_of_buckets_grow_fourfold() -> None:
    inputs, tiles, _ = recorded(ISOLATED)[0]
    sizes = {Bucket.of(inputs.padded(tokens), tiles).tokens for tokens in range(60, 1000)}
    assert sizes == {64, 256, 1024}

"""The attention kernel equals dense attention in float64, for every mask, size and dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallelmind.engine.attention_spans import AttentionSpans, make_spans
from parallelmind.engine.batch import PADDING, AttentionSegment, ModelInput, TokenMeta
from parallelmind.engine.block_manager import BLOCK, CachedBlock
from parallelmind.engine.block_table import BlockTable, BlockTables
from parallelmind.engine.native_attention import NativeAttention, NativeLayer
from parallelmind.tree import Ints
from parallelmind.visibility import AttentionWindow

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
EMPTY = np.empty(0, np.int64)
WHOLE = AttentionWindow()


@dataclass
class Case:
    """A step of one sample: a main, branches behind it, and the last tokens of each as queries."""

    main: int
    branches: list[int]
    queries: int = 1
    heads: int = 6
    kv_heads: int = 2
    dim: int = 32
    value_dim: int = 32
    window: AttentionWindow = WHOLE
    columnar: bool = False
    softcap: float | None = None
    sinks: bool = False
    padding: int = 0


CASES = {
    "one token": Case(0, [5]),
    "branches": Case(0, [84, 3, 17, 64]),
    "a main": Case(200, [40, 1, 16], queries=1),
    "a long main": Case(2100, [40, 1, 16], queries=2),
    "a long branch": Case(0, [1300, 5]),
    "many branches": Case(600, [5, 17, 64, 90, 1, 2, 3, 4, 9, 30, 70, 8], heads=9, kv_heads=3),
    "a prompt": Case(130, [70, 70], queries=65),
    "one KV head": Case(150, [40] * 10, heads=8, kv_heads=1),
    "two vectors of rows": Case(150, [7] * 16, heads=4, kv_heads=2, value_dim=40),
    "columnar": Case(70, [40, 60, 20], queries=2, columnar=True),
    "many columns": Case(0, [17] * 20, columnar=True),
    "a window": Case(100, [40, 60], queries=3, window=AttentionWindow(window=30)),
    "chunks": Case(100, [40, 60], queries=3, window=AttentionWindow(chunk=64)),
    "odd sizes": Case(20, [9, 30], heads=4, kv_heads=4, dim=24, value_dim=17),
    "large values": Case(20, [9], heads=2, kv_heads=1, dim=96, value_dim=160),
    "softcap": Case(90, [20, 5], softcap=2.0),
    "softcap of many": Case(90, [20] * 6, softcap=2.0),
    "sinks": Case(90, [20, 5], sinks=True),
    "padding": Case(10, [4], padding=3),
}


def block_tables(lengths: list[int]) -> tuple[BlockTables, list[BlockTable]]:
    """Tables of these lengths, with blocks in random order, of which every third is used in part."""
    num_blocks = 2 * sum(length // BLOCK + 3 for length in lengths)
    tables, free = BlockTables(num_blocks * BLOCK), np.random.default_rng(0).permutation(num_blocks).tolist()
    made = [BlockTable() for _ in lengths]
    for table, length in zip(made, lengths, strict=True):
        while table.length < length:
            count = min(5 if len(table.blocks) % 3 == 1 else BLOCK, length - table.length)
            table.adopt(tables, CachedBlock(free.pop(), count))
    return tables, made


def make(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The tokens of the step are at the ends of their branches."""
    generator = torch.Generator().manual_seed(0)
    lengths = [case.main, *case.branches]
    segment = np.repeat(np.arange(len(lengths)), lengths)
    time = np.concatenate([np.arange(case.main), *(case.main + np.arange(n) for n in case.branches)])
    tables, made = block_tables([sum(lengths)] if case.columnar else lengths)
    slots = np.concatenate([table.slots for table in made])
    tables.place(slots, time, segment)
    everything = TokenMeta(slots, time, segment)
    ends = np.cumsum(lengths)[1:]
    chosen = np.concatenate(
        [np.arange(end - min(case.queries, n), end) for end, n in zip(ends, case.branches, strict=True)]
    )
    scores = np.full((len(lengths), len(lengths)), -1.5 if case.columnar else -np.inf, np.float32)
    scores[:, 0] = 0
    np.fill_diagonal(scores, 0)
    queries = everything.at(chosen)
    spans = make_case_spans(case, made, queries.segment, scores)
    pad = (0, case.padding)
    inputs = ModelInput(
        ids=np.pad(chosen, pad),
        segment=np.pad(queries.segment, pad),
        branch=np.pad(chosen, pad),
        time=np.pad(queries.time, pad),
        position=np.pad(chosen, pad),
        slots=np.pad(queries.slots, pad, constant_values=PADDING),
        logits_indices=EMPTY,
        spans=spans,
        num_keys=tables.length[spans.tables],
        tables=tables,
        adapters=(),
        adapter=np.zeros(len(queries.slots) + case.padding, np.int64),
    )
    shape = {
        "q": (case.heads, case.dim),
        "k": (case.kv_heads, case.dim),
        "v": (case.kv_heads, case.value_dim),
    }
    states = {
        name: torch.randn(1, heads, len(inputs.ids), dim, generator=generator).to(dtype)
        for name, (heads, dim) in shape.items()
    }
    pools = tuple(
        torch.randn(len(tables.time), *shape[name], generator=generator).to(dtype) for name in ("k", "v")
    )
    sinks = torch.randn(case.heads, generator=generator) if case.sinks else None
    return {
        "inputs": inputs,
        "states": states,
        "pools": pools,
        "sinks": sinks,
        "everything": everything,
        "scores": scores,
    }


def make_case_spans(
    case: Case, tables: list[BlockTable], segment: Ints, scores: NDArray[np.float32]
) -> AttentionSpans:
    """One span of everything, or one of each branch and behind them that of main."""
    if case.columnar:
        whole = make_spans([0], [range(len(segment))], [[tables[0].row]])
        return replace(whole, score=np.zeros(1, np.int32), scores=(scores,))
    branches = range(1, len(case.branches) + 1)
    level, queries = [1] * len(branches), [np.flatnonzero(segment == number).tolist() for number in branches]
    rows = [[tables[number].row] for number in branches]
    if case.main:
        level, queries, rows = [*level, 0], [*queries, range(len(segment))], [*rows, [tables[0].row]]
    return make_spans(level, queries, rows)


def attend(case: Case, made: dict[str, Any]) -> Tensor:
    states, softcap = made["states"], case.softcap
    layer = NativeLayer(states["q"], made["pools"], 0.3, softcap, made["sinks"])
    step = NativeAttention(made["inputs"]).step(case.window)
    return layer(step, states["q"], states["k"], states["v"])


def reference(case: Case, made: dict[str, Any]) -> Tensor:
    """Dense attention in float64 over all tokens of the sample."""
    inputs, everything = made["inputs"], made["everything"]
    num = len(inputs.ids) - case.padding
    keys, values = (pool.clone() for pool in made["pools"])
    for pool, name in ((keys, "k"), (values, "v")):
        pool[torch.from_numpy(inputs.slots[:num])] = made["states"][name][0].transpose(0, 1)[:num]
    bias = torch.from_numpy(
        AttentionSegment(
            np.arange(num),
            TokenMeta(inputs.slots, inputs.time, inputs.segment).at(np.arange(num)),
            everything,
            made["scores"],
        ).bias(case.window)
    ).double()
    group = case.heads // case.kv_heads
    slots = torch.from_numpy(everything.slots)
    key, value = (pool[slots].double().repeat_interleave(group, 1).transpose(0, 1) for pool in (keys, values))
    scores = made["states"]["q"][0, :, :num].double() @ key.transpose(1, 2) * 0.3
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    scores = scores + bias
    if made["sinks"] is not None:
        sink = made["sinks"].double()[:, None, None].expand(-1, num, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(0, 1)[None]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_dense_attention(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    made = make(case, dtype)
    expected = reference(case, made)
    out = attend(case, made)
    num = expected.shape[1]
    assert out.dtype == dtype
    assert (out[:, :num].double() - expected).norm() / expected.norm() < TOLERANCES[dtype]
    assert not out[:, num:].any(), "padding sees nothing"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_keys_and_values_of_the_step_are_in_the_cache_afterwards(dtype: torch.dtype) -> None:
    case = CASES["padding"]
    made = make(case, dtype)
    before = made["pools"][0].clone()
    attend(case, made)
    slots = torch.from_numpy(made["inputs"].slots[: -case.padding])
    assert torch.equal(made["pools"][0][slots], made["states"]["k"][0].transpose(0, 1)[: len(slots)])
    others = torch.ones(len(before), dtype=torch.bool)
    others[slots] = False
    assert torch.equal(made["pools"][0][others], before[others])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_only_those_who_read_them(value: float, dtype: torch.dtype) -> None:
    """Branch 2 holds them in its first token; branches 1 and 3 do not read it."""
    case = CASES["branches"]
    made = make(case, dtype)
    poisoned = made["everything"].slots[case.branches[0]]
    for pool in made["pools"]:
        pool[poisoned] = value
    out = attend(case, made)[0]
    assert out[[0, 2, 3]].isfinite().all()
    assert not out[1].isfinite().all()

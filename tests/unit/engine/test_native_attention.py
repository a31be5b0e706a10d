"""The attention kernel equals dense attention in float64, for every mask, size and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parallelmind.engine.batch import PADDING, AttentionSegment, ModelInput, TokenMeta
from parallelmind.engine.native_attention import NativeAttention, NativeLayer
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
    "a prompt": Case(130, [70, 70], queries=65),
    "columnar": Case(70, [40, 60, 20], queries=2, columnar=True),
    "a window": Case(100, [40, 60], queries=3, window=AttentionWindow(window=30)),
    "chunks": Case(100, [40, 60], queries=3, window=AttentionWindow(chunk=64)),
    "odd sizes": Case(20, [9, 30], heads=4, kv_heads=4, dim=24, value_dim=17),
    "large values": Case(20, [9], heads=2, kv_heads=1, dim=96, value_dim=160),
    "softcap": Case(90, [20, 5], softcap=2.0),
    "sinks": Case(90, [20, 5], sinks=True),
    "padding": Case(10, [4], padding=3),
}


def make(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Slots in random order, and the tokens of the step at the ends of their branches."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    lengths = [case.main, *case.branches]
    slots = rng.permutation(sum(lengths) + 7)[: sum(lengths)]
    segment = np.repeat(np.arange(len(lengths)), lengths)
    time = np.concatenate([np.arange(case.main), *(case.main + np.arange(n) for n in case.branches)])
    everything = TokenMeta(slots, time, segment)
    ends = np.cumsum(lengths)[1:]
    chosen = np.concatenate(
        [np.arange(end - min(case.queries, n), end) for end, n in zip(ends, case.branches, strict=True)]
    )
    scores = np.full((len(lengths), len(lengths)), -1.5 if case.columnar else -np.inf, np.float32)
    scores[:, 0] = 0
    np.fill_diagonal(scores, 0)
    queries = everything.at(chosen)
    pad = (0, case.padding)
    inputs = ModelInput(
        ids=np.pad(chosen, pad),
        segment=np.pad(queries.segment, pad),
        branch=np.pad(chosen, pad),
        time=np.pad(queries.time, pad),
        position=np.pad(chosen, pad),
        slots=np.pad(queries.slots, pad, constant_values=PADDING),
        logits_indices=EMPTY,
        segments=segments(case, everything, queries, scores),
        adapters=(),
        adapter=EMPTY,
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
        torch.randn(sum(lengths) + 7, *shape[name], generator=generator).to(dtype) for name in ("k", "v")
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


def segments(case: Case, everything: TokenMeta, queries: TokenMeta, scores: Any) -> list[AttentionSegment]:
    index = np.arange(len(queries.slots))
    if case.columnar:
        return [AttentionSegment(index, queries, everything, scores)]
    found = [
        AttentionSegment(
            index[queries.segment == number],
            queries.at(index[queries.segment == number]),
            everything.at(np.flatnonzero(everything.segment == number)),
            scores,
            level=1,
        )
        for number in range(1, len(case.branches) + 1)
    ]
    main = everything.at(np.flatnonzero(everything.segment == 0))
    return [*found, AttentionSegment(index, queries, main, scores)] if case.main else found


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

"""Greedy tokens straight from the head's product are those that the logits give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engines import run_to_end, tiny_engine
from torch import Tensor

from parallelmind.engine.engine import Engine
from parallelmind.engine.native import kernels
from parallelmind.engine.request import Sample
from parallelmind.engine.sampler import PendingTokens, SamplingRow

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")
SAMPLE = Sample("who", ["is", "a", "where the"])


class WatchedEngine(Engine):
    """Notes the shapes of what tokens are sampled from."""

    may_take_most_likely = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.dims: list[int] = []

    def takes_most_likely(self, rows: Sequence[SamplingRow]) -> bool:
        return self.may_take_most_likely and super().takes_most_likely(rows)

    def sample(self, logits: Tensor, *args: Any) -> PendingTokens:
        self.dims.append(logits.dim())
        return super().sample(logits, *args)


class LogitsEngine(WatchedEngine):
    may_take_most_likely = False


def decode(kind: type[WatchedEngine], **sampling: Any) -> tuple[list[int | None], set[int]]:
    """The tokens of a sample, and the dimensions of what all but the first pass has returned."""
    engine = tiny_engine(kind=kind)
    engine.submit(SAMPLE, **{"max_new_tokens": 8, "ignore_eos": True, **sampling})
    tokens = [event.token for event in run_to_end(engine)]
    assert isinstance(engine, WatchedEngine)
    return tokens, set(engine.dims[1:])


def test_greedy_tokens_are_those_of_the_logits() -> None:
    tokens, dims = decode(WatchedEngine)
    assert dims == {1}
    assert decode(LogitsEngine) == (tokens, {2})


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 1},
        {"logprobs": 1},
        {"repetition_penalty": 1.5},
        {"logit_bias": {5: 2.0}},
        {"grammar": {"regex": "[a-z]{20}"}, "ignore_eos": False},
    ],
    ids=str,
)
def test_logits_are_computed_where_a_row_needs_them(sampling: dict[str, Any]) -> None:
    assert decode(WatchedEngine, **sampling)[1] == {2}


def test_a_layer_behind_the_head_keeps_the_logits() -> None:
    engine = tiny_engine(kind=WatchedEngine)
    head = engine.model.get_output_embeddings()
    with head.register_forward_hook(lambda *args: -args[-1]):
        engine.submit(SAMPLE, max_new_tokens=4, ignore_eos=True)
        tokens = [event.token for event in run_to_end(engine)]
    assert isinstance(engine, WatchedEngine)
    assert set(engine.dims) == {2}
    assert tokens != decode(WatchedEngine, max_new_tokens=4)[0]


def test_rows_that_are_not_finite_end_with_an_error() -> None:
    engine = tiny_engine(kind=WatchedEngine)
    head: Any = engine.model.get_output_embeddings()
    head.weight.data = head.weight.data.clone()  # not the embeddings
    head.weight.data[7] = torch.nan
    engine.submit(SAMPLE, max_new_tokens=4, ignore_eos=True)
    events = run_to_end(engine)
    assert [event.finish_reason for event in events] == ["error"] * len(SAMPLE.branches)

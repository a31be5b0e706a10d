"""A request for an engine, and an EngineLoop that is stopped after its test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tiny import tiny_tokenizer

from parallelmind.engine.request import Sample
from parallelmind.engine.tokenization import tokenize_request
from serving.engine.loop import EngineLoop
from serving.engine.messages import EngineRequest

MAIN, BRANCHES = list(range(50, 70)), [[5, 6, 7], [8], list(range(100, 112))]


def sample_request(
    reduce: bool = False, lengths: Sequence[int] = (9, 4, 6), **settings: Any
) -> EngineRequest:
    """Three seeded branches of different lengths, with or without a reduce branch."""
    per_branch = [{"max_new_tokens": length} for length in lengths]
    sampling = {"temperature": 1.0, "seed": 3, "ignore_eos": True, "max_new_tokens": 5, **settings}
    sample, reduce_ids = Sample(MAIN, BRANCHES), [41, 42] if reduce else None
    tokenized = tokenize_request(tiny_tokenizer(), sample, per_branch, reduce_ids, sampling)
    return EngineRequest("smp-1", "base", tokenized)


@contextmanager
def running_loop(engine: Any, stuck_s: float = 60) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine, lambda *_: None, stuck_s, num_threads=1)
    try:
        yield loop
    finally:
        loop.stop()

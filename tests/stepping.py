"""A sample to step through, and who steps an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tiny import tiny_tokenizer

from parallelmind.engine.request import Sample
from parallelmind.engine.tokenization import tokenize_request
from serving.engine.loop import EngineLoop
from serving.engine.messages import EngineRequest

MAIN, BRANCHES = list(range(50, 70)), [[5, 6, 7], [8], list(range(100, 112))]


def work(reduce: bool = False, **settings: Any) -> EngineRequest:
    each = [{"max_new_tokens": most} for most in (9, 4, 6)]
    sampling = {"temperature": 1.0, "seed": 3, "ignore_eos": True, "max_new_tokens": 5, **settings}
    last = [41, 42] if reduce else None
    return EngineRequest(
        "smp-1", "base", tokenize_request(tiny_tokenizer(), Sample(MAIN, BRANCHES), each, last, sampling)
    )


@contextmanager
def started(engine: Any, stuck_s: float = 60) -> Iterator[EngineLoop]:
    stepper = EngineLoop(engine, lambda *_: None, stuck_s, threads=1)
    try:
        yield stepper
    finally:
        stepper.stop()

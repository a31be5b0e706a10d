"""Continuous batching: keep one engine busy with input lines and yield their results in input order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import parallelmind as pm
from parallelmind.data.records import RecordError
from parallelmind.engine.generate import warn_if_fallback
from parallelmind.engine.linear import Linearizer
from parallelmind.errors import UserError
from parallelmind.model.structure import to_gpu
from workloads.generate.lines import InputLine
from workloads.generate.results import GeneratedSample, LineResult

_MAX_IN_FLIGHT = 64  # samples in the engine at a time
_MAX_PENDING = 1024  # results held back until an earlier line has finished


class Decoder:
    """An engine with the settings of a run.

    reduce: prompt of the reduce branch of lines that have none. tokens: number of all generated tokens.
    """

    def __init__(self, engine: pm.Engine, sampling: Mapping[str, Any], reduce: str | None) -> None:
        self.engine, self.sampling, self.reduce = engine, sampling, reduce
        self.tokens = 0
        self._linearizer = Linearizer()

    @classmethod
    def load(
        cls, load_kwargs: Mapping[str, Any], sampling: Mapping[str, Any], reduce: str | None, use_gpu: bool
    ) -> Decoder:
        """Load the model with `load_model_with_lora(**load_kwargs)` and raise its UserErrors."""
        model: Any
        model, tokenizer = pm.load_model_with_lora(**load_kwargs)
        return cls(pm.Engine(to_gpu(model) if use_gpu else model, tokenizer), sampling, reduce)

    def decode(self, lines: Iterable[InputLine]) -> Iterator[list[LineResult]]:
        """Decode all lines. After each engine step, yield the results that are next in input order.

        A line that is no valid sample, or of which a branch ends with an error, gives a result with its
        `skip_reason`.
        """
        pending: deque[LineResult] = deque()  # results in input order, unfinished ones included
        running: dict[int, LineResult] = {}  # samples in the engine, by engine request number
        remaining = iter(lines)
        while True:
            while len(running) < _MAX_IN_FLIGHT and len(pending) < _MAX_PENDING:
                if (line := next(remaining, None)) is None:
                    break
                pending.append(self._submit(line, running))
            if not pending:
                return
            self._step(running)
            ready = []
            while pending and pending[0].is_finished:
                ready.append(pending.popleft())
            yield ready

    def _submit(self, line: InputLine, running: dict[int, LineResult]) -> LineResult:
        try:
            prompt = line.to_prompt(self.engine.tokenizer).with_reduce(self.reduce)
            number = self.engine.submit(prompt.sample, **self.sampling)
        except (RecordError, UserError) as error:
            return LineResult(line, skip_reason=str(error))
        if len(prompt.sample.branches) > 1:
            warn_if_fallback(self.engine)
        running[number] = LineResult(line, GeneratedSample.empty(prompt))
        return running[number]

    def _step(self, running: dict[int, LineResult]) -> None:
        steps = self.engine.step() if running else ()
        for event in chain.from_iterable(map(self._linearizer.push, steps)):
            running[event.sample].append(event)
            self.tokens += event.token is not None
            if running[event.sample].is_finished:
                del running[event.sample]

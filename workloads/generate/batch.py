"""Continuous batching: an engine that is kept full from a sequence of lines, and gives their results in that
order.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import parallelmind as pm
from parallelmind.data.records import RecordError
from parallelmind.engine.sequence import FinishReason
from parallelmind.errors import UserError, UserNotice
from parallelmind.model.structure import to_gpu
from workloads.generate.source import Entry

_IN_FLIGHT = 64  # samples that the engine has at a time
_AHEAD = 1024  # lines whose results may wait for that of an earlier one


@dataclass(slots=True)
class GeneratedSample:
    """A sample and what its branches say, more with every event; the reducing one, if there is one, is the
    last.
    """

    sample: pm.Sample
    texts: list[str]
    reasons: list[FinishReason | None]

    @classmethod
    def of(cls, sample: pm.Sample, reduce: str | None) -> Self:
        branches = len(sample.branches) + (reduce is not None)
        return cls(sample, [""] * branches, [None] * branches)

    def add(self, event: pm.Event) -> None:
        self.texts[event.branch] += event.text
        self.reasons[event.branch] = event.finish_reason

    @property
    def done(self) -> bool:
        return all(self.reasons)

    def row(self) -> dict[str, Any]:
        """One object of the output."""
        sample = {"main": self.sample.main, "branches": list(self.sample.branches)}
        return {**sample, "outputs": self.texts, "finish_reasons": self.reasons}


@dataclass(slots=True)
class Result:
    """What became of a line: its sample, continued, or why there is none."""

    entry: Entry
    continued: GeneratedSample | None = None
    problem: str = ""

    @property
    def done(self) -> bool:
        return self.continued is None or self.continued.done

    def row(self) -> dict[str, Any]:
        assert self.continued is not None, "only lines without a problem have a row"
        return {"line": self.entry.number, **self.continued.row()}


class Decoder:
    """An engine and how its samples are continued. tokens: all that it has given so far."""

    def __init__(self, engine: pm.Engine, sampling: Mapping[str, Any], reduce: str | None) -> None:
        self.engine, self.sampling, self.reduce = engine, sampling, reduce
        self.tokens = 0

    @classmethod
    def load(
        cls, model: Mapping[str, Any], sampling: Mapping[str, Any], reduce: str | None, gpu: bool
    ) -> Decoder:
        """model: keywords of `load_model_with_lora`, whose UserErrors this raises. gpu: move the model
        there.
        """
        loaded: Any
        loaded, tokenizer = pm.load_model_with_lora(**model)
        return cls(pm.Engine(to_gpu(loaded) if gpu else loaded, tokenizer), sampling, reduce)

    def run(self, entries: Iterable[Entry]) -> Iterator[list[Result]]:
        """After each step of the engine, the results that are ready: one for each entry in all, in their
        order.
        """
        waiting: deque[Result] = deque()  # for their own end, or for that of an earlier one
        going: dict[int, GeneratedSample] = {}
        source = iter(entries)
        while True:
            while len(going) < _IN_FLIGHT and len(waiting) < _AHEAD and (entry := next(source, None)):
                waiting.append(self._begin(entry, going))
            if not waiting:
                return
            self._step(going)
            ready = []
            while waiting and waiting[0].done:
                ready.append(waiting.popleft())
            yield ready

    def _begin(self, entry: Entry, going: dict[int, GeneratedSample]) -> Result:
        try:
            sample = entry.sample(self.engine.tokenizer)
            number = self.engine.submit(sample, reduce=self.reduce, **self.sampling)
        except (RecordError, UserError) as error:
            return Result(entry, problem=str(error))
        if self.engine.apart and len(sample.branches) > 1:
            said = f"the model {self.engine.apart}; branches are decoded isolated, each in a row of its own"
            warnings.warn(said, UserNotice, stacklevel=2)
        going[number] = GeneratedSample.of(sample, self.reduce)
        return Result(entry, going[number])

    def _step(self, going: dict[int, GeneratedSample]) -> None:
        for event in self.engine.step() if going else ():
            going[event.sample].add(event)
            self.tokens += event.token is not None
            if going[event.sample].done:
                del going[event.sample]


class ProgressStats:
    """What a run has come to, and how fast. total: lines that it has to do."""

    def __init__(self, total: int) -> None:
        self.total, self.samples, self.tokens = total, 0, 0
        self.bad, self.worst = 0, ""
        self.started = time.monotonic()

    @property
    def done(self) -> int:
        return self.samples + self.bad

    def skip(self, place: str, problem: str) -> None:
        """Tell of a line that is left out."""
        self.bad += 1
        self.worst = self.worst or f"{place}: {problem}"
        print(f"left out: {place}: {problem}", file=sys.stderr)

    def line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{self.done} of {self.total} lines, {self.done / seconds:.2f} lines/s, {self.tokens / seconds:.1f} tokens/s"

    def end(self, data_path: str, written: bool) -> None:
        """Say how it went. written: whether the output holds any row. Raises UserError if it holds none."""
        if self.bad:
            print(f"bad lines left out: {self.bad} of {self.total}", file=sys.stderr)
        if not written:
            why = f" (bad lines: {self.bad}, the first: {self.worst})" if self.bad else ""
            raise UserError(f"data_path={data_path}: holds no usable line{why}; write one sample a line")
        print(speed(self.samples, self.tokens, time.monotonic() - self.started), file=sys.stderr)


def speed(samples: int, tokens: int, seconds: float) -> str:
    return (
        f"{samples} samples, {tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.1f} tokens/s"
    )

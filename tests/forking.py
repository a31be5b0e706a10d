"""Engines over a tiny model that writes forks: chosen tokens come before those that it samples itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.fork_parser import Fork
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.output import Event
from parallelmind.engine.request import Sample
from parallelmind.engine.sampler import PendingTokens, SampledToken, SamplingRow
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.model.fork_markers import set_fork_markers
from parallelmind.model.patch import patch

MARKERS = ["{", "|", "}", "~"]
Script = Callable[[int, int], str]  # what a branch writes first, by its seed and its draw index


class ChosenTokens(PendingTokens):
    """Tokens with the log-probabilities that the model gives them."""

    def __init__(self, tokens: list[SampledToken]) -> None:
        ids = torch.tensor([token.token for token in tokens], dtype=torch.int64)
        super().__init__(ids, ids)
        self._tokens = tokens

    def read(self) -> list[SampledToken]:
        return self._tokens


class ScriptedEngine(Engine):
    """The first tokens of a branch are those of a text; the others are sampled."""

    script: Script = staticmethod(lambda seed, branch: "")

    def takes_most_likely(self, rows: Sequence[SamplingRow]) -> bool:
        return False

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None
    ) -> PendingTokens:
        sampled = super().sample(logits, rows, masks).read()
        return ChosenTokens([self._scripted(*row) for row in zip(rows, sampled, logits, strict=True)])

    def _scripted(self, row: SamplingRow, token: SampledToken, logits: Tensor) -> SampledToken:
        ids = tiny_tokenizer().encode(self.script(row.seed, row.branch))
        if row.index >= len(ids):
            return token
        return SampledToken(ids[row.index], float(torch.log_softmax(logits.float(), -1)[ids[row.index]]))


def forking_engine(
    config: RopeConfig, script: Script | dict[int, str], markers: Sequence[str] = MARKERS, **limits: int
) -> ScriptedEngine:
    """script: a function, or the texts by index of a branch."""
    model = tiny_llama()
    patch(model, config)
    set_fork_markers(model, markers)
    engine = ScriptedEngine(model, tiny_tokenizer(), EngineConfig(**{"cache_tokens": 4096, **limits}))
    engine.script = script if callable(script) else lambda _, branch: script.get(branch, "")  # type: ignore[method-assign]
    return engine


def tokens_by_index(events: Sequence[Event]) -> dict[int, list[int]]:
    """The tokens of every segment of one sample."""
    tokens = defaultdict[int, list[int]](list)
    for event in events:
        tokens[event.branch] += [] if event.token is None else [event.token]
    return dict(tokens)


def forks_of(events: Sequence[Event]) -> dict[int, Fork]:
    """The forks that segments wrote, in the order in which they did."""
    return {event.branch: event.fork for event in events if event.fork is not None}


def replay(
    engine: Engine,
    sample: Sample,
    settings: Mapping[str, Any],
    tokens: Mapping[int, Sequence[int]],
    forks: Mapping[int, Fork],
) -> list[Event]:
    """Decode a sample that forked by itself by calls of `fork` and `reduce` at the same places."""
    adapter = settings.get("adapter")
    own = {name: value for name, value in settings.items() if name != "adapter"} | {"max_fork_branches": 0}
    number = engine.submit(sample, adapter=adapter, **own)
    events, waiting, limits = list[Event](), dict(forks), {0: own["max_new_tokens"]}
    while engine.busy:
        events += engine.step()
        written = tokens_by_index(events)
        for branch in [index for index in waiting if len(written.get(index, ())) == len(tokens[index])]:
            titles, left = waiting.pop(branch).titles, limits[branch] - len(tokens[branch])
            share = left // 2 // len(titles)
            added = engine.fork(number, branch, list(titles), **{**own, "max_new_tokens": share})
            rest = left - share * len(titles)
            last = engine.reduce(number, branch, MARKERS[3], **{**own, "max_new_tokens": rest})
            limits |= {**dict.fromkeys(added, share), last: rest}
    return events

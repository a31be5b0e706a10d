"""Engines over a tiny model that writes forks: chosen tokens come before those that it samples itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.sampler import SampledToken, SamplingRow
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.model.fork_markers import set_fork_markers
from parallelmind.model.patch import patch

MARKERS = ["{", "|", "}", "~"]
Script = Callable[[int, int], str]  # what a branch writes first, by its seed and its draw index


class ScriptedEngine(Engine):
    """The first tokens of a branch are those of a text; the others are sampled."""

    script: Script = staticmethod(lambda seed, branch: "")

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None
    ) -> list[SampledToken]:
        sampled = super().sample(logits, rows, masks)
        return [self._scripted(*row) for row in zip(rows, sampled, logits, strict=True)]

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

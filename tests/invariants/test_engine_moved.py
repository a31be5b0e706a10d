"""A sample that moves to another engine, after any step, ends there as it would have where it began."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from engines import tiny_engine
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import ResumeState, Sample, TokenizedRequest
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.evaluation import tiny_models as tiny
from parallelmind.layout import Tokens

MAIN, BRANCHES, LATE, LAST = (
    list(range(50, 70)),
    [[5, 6, 7], [8], list(range(100, 112))],
    [31, 32],
    [41, 42, 43],
)
LENGTHS = [9, 4, 6]
CONFIGS = [
    RopeConfig(visibility=visibility, positions=positions, align_to=align, rope_2d_ratio=0.5)
    for visibility, positions, align in product(("columnar", "isolated"), ("time", "flat"), ("left", "right"))
]
SAMPLING = {
    "greedy": {},
    "seeded": {"temperature": 1.5, "seed": 3},
    "stopped": {"stop": ["e"], "repetition_penalty": 1.3},
}


class Listener:
    """Notes what a server would know of a sample, were its engine to die now."""

    def __init__(self, asked: TokenizedRequest) -> None:
        self.asked, self.texts = asked, [""] * (asked.tokens.branches + (asked.reduce is not None))
        self.progress = ResumeState(
            [], [[] for _ in range(asked.tokens.branches)], [None] * asked.tokens.branches
        )

    def follow(self, engine: Engine) -> None:
        for event in engine.step():
            while event.branch >= len(self.progress.token_ids):  # the one that reads all others has begun
                self._add()
            self.texts[event.branch] += event.text
            self.progress.token_ids[event.branch] += [] if event.token is None else [event.token]
            self.progress.finish_reasons[event.branch] = event.finish_reason

    def begin(self, engine: Engine) -> int:
        """Go on where this sample has come to, or begin it."""
        number = engine.enqueue(self.asked, resume=self.progress if self.progress.start_times else None)
        self.progress.start_times[:] = [time for _, time in engine.start_pos2d(number)][
            : self.asked.tokens.branches
        ]
        return number

    def join(self, engine: Engine, number: int) -> None:
        branch = engine.join(number, LATE, max_new_tokens=5, ignore_eos=True)
        tokens = self.asked.tokens
        prompts = [*(row.tolist() for row in split(tokens)), LATE]
        params = [*self.asked.params, type(self.asked.params[0])(max_new_tokens=5, ignore_eos=True)]
        self.asked = TokenizedRequest(
            Tokens.of(tokens.ids[: tokens.lengths[0]].tolist(), prompts), params, self.asked.reduce
        )
        self.progress.start_times.append(engine.start_pos2d(number)[branch][1])
        self._add()
        self.texts.append("")

    def _add(self) -> None:
        self.progress.token_ids.append([])
        self.progress.finish_reasons.append(None)


def split(tokens: Tokens) -> list[Any]:
    starts = tokens.lengths.cumsum()
    return [
        tokens.ids[start : start + length] for start, length in zip(starts, tokens.lengths[1:], strict=False)
    ]


def asked(reduce: bool, settings: dict[str, Any]) -> TokenizedRequest:
    each = [{"max_new_tokens": most} for most in LENGTHS]
    sampling = {**settings, "ignore_eos": True, "max_new_tokens": 5}
    return tokenize_request(
        tiny_tokenizer(), Sample(MAIN, BRANCHES), each, LAST if reduce else None, sampling
    )


def moved(
    engine_of: Callable[[], Engine], settings: dict[str, Any], cut: int, joins: bool, reduce: bool
) -> Listener:
    """A sample that another engine goes on with after `cut` steps. A branch may join it late, and one is
    cancelled.
    """
    found, engine, step, late, early = Listener(asked(reduce, settings)), engine_of(), 0, joins, True
    number, said = found.begin(engine), found.progress.token_ids
    while engine.busy:
        if step == cut:
            engine = engine_of()
            number = found.begin(engine)
        if late and len(said[0]) == 2:
            found.join(engine, number)
            late = False
        if early and len(said[2]) == 3:
            engine.cancel(number, 2)
            early = False
        found.follow(engine)
        step += 1
    return found


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.visibility}-{config.positions}-{config.align_to}"
)
@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize(
    ("joins", "reduce"), [(False, False), (True, False), (False, True)], ids=["", "joined", "reduced"]
)
def test_a_moved_sample_says_the_same(
    config: RopeConfig, settings: dict[str, Any], joins: bool, reduce: bool
) -> None:
    def engine_of() -> Engine:
        return tiny_engine(config, max_prefill_tokens=16)

    whole = moved(engine_of, settings, -1, joins, reduce)
    for cut in range(1, 12, 3):
        if (joins and cut in (3, 4, 5)) or cut == 5:
            continue  # told of, but not yet heard
        parts = moved(engine_of, settings, cut, joins, reduce)
        assert (parts.progress.token_ids, parts.texts, parts.progress.finish_reasons) == (
            whole.progress.token_ids,
            whole.texts,
            whole.progress.finish_reasons,
        ), cut


def test_a_moved_sample_of_a_model_with_a_memory_says_the_same() -> None:
    def engine_of() -> Engine:
        return Engine(tiny.tiny_model("mamba2"), tiny_tokenizer(), EngineConfig(cache_tokens=512))

    whole = moved(engine_of, {}, -1, joins=False, reduce=False)
    for cut in (1, 3, 7):
        assert moved(engine_of, {}, cut, joins=False, reduce=False).texts == whole.texts

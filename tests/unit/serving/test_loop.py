"""The thread that steps an engine tells everything to whoever waits, failures too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import Any

import pytest
from engines import ISOLATED, tiny_engine
from stepping import started, work
from tiny import tiny_tokenizer

from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event as Said
from parallelmind.engine.request import Sample
from parallelmind.engine.tokenization import tokenize_request
from serving.engine.loop import EngineStuckError
from serving.engine.messages import EngineRequest


def failing_engine(act: Callable[[], object]) -> Any:
    engine = tiny_engine(ISOLATED)

    def fail(*_: Any) -> Any:
        act()
        raise ValueError("no such luck")

    engine.runner.__class__ = type("Failing", (type(engine.runner),), {"__call__": fail})
    return engine


UNHANDLED = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@UNHANDLED
def test_an_engine_that_fails_tells_everybody_and_takes_no_more() -> None:
    async def use() -> None:
        with started(failing_engine(lambda: None)) as stepper:
            number = stepper.begin(work(), None)
            with pytest.raises(EngineStuckError, match="no such luck"):
                await asyncio.wait_for(stepper.next(number), 10)
            with pytest.raises(EngineStuckError):
                stepper.begin(work(), None)
            with pytest.raises(EngineStuckError):
                stepper.check()

    asyncio.run(use())


@UNHANDLED
def test_an_engine_that_does_not_come_back_from_a_step_is_not_healthy() -> None:
    go_on = Event()

    async def use() -> None:
        with started(failing_engine(lambda: go_on.wait(10)), stuck_s=0.05) as stepper:
            stepper.check()
            number = stepper.begin(work(), None)
            await asyncio.sleep(0.3)
            with pytest.raises(EngineStuckError, match=r"more than 0.05 s"):
                stepper.check()
            go_on.set()
            with suppress(EngineStuckError):
                await asyncio.wait_for(stepper.next(number), 10)

    asyncio.run(use())


def test_who_leaves_is_forgotten_by_the_engine() -> None:
    async def use() -> None:
        engine = tiny_engine(ISOLATED)
        with started(engine) as stepper:
            number = stepper.begin(work(max_new_tokens=200), None)
            await stepper.next(number)
            stepper.drop(number)
            assert not engine.has_sample(number)
            assert engine.stats().live_branches == 0

    asyncio.run(use())


class Ahead(Engine):
    """Has computed its last step by the time that anybody looks at the one before, and tells of it later
    still.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.computed, self.tell = Event(), Event()

    def step(self) -> list[Said]:
        events = super().step()
        if not self._samples:
            self.computed.set()
            self.tell.wait(10)
        return events


def test_a_sample_is_not_over_before_its_last_word_has_been_told() -> None:
    async def use() -> list[int | None]:
        engine = tiny_engine(ISOLATED, Ahead)
        assert isinstance(engine, Ahead)
        with started(engine) as stepper:
            sample = EngineRequest(
                "smp-1",
                "base",
                tokenize_request(tiny_tokenizer(), Sample([], [[5, 6]]), None, None, {"max_new_tokens": 2}),
            )
            number = stepper.begin(sample, None)
            engine.computed.wait(10)  # and nobody listens meanwhile
            heard = []
            while (step := await stepper.next(number)) is not None:
                heard += [event.token for event in step.events]
                engine.tell.set()
            return heard

    assert len(asyncio.run(use())) == 2

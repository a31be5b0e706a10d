"""A sample whose engine dies is ended by another one, and whoever follows it does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from threading import Event
from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED, tiny_engine
from ray.exceptions import ActorDiedError
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.decoding.checks import Asked
from parallelmind.decoding.engine import Engine
from parallelmind.decoding.samples import Event as Said
from parallelmind.decoding.samples import Sample
from parallelmind.errors import UserError
from serving.errors import EngineLost, RequestError
from serving.meters import FrontMeters
from serving.stepper import Stepper, Stuck
from serving.tale import follow, within
from serving.work import Begun, Packed, Refusal, Step, Work, packed

MAIN, BRANCHES = list(range(50, 70)), [[5, 6, 7], [8], list(range(100, 112))]


def work(reduce: bool = False, **settings: Any) -> Work:
    each = [{"max_new_tokens": most} for most in (9, 4, 6)]
    sampling = {"temperature": 1.0, "seed": 3, "ignore_eos": True, "max_new_tokens": 5, **settings}
    last = [41, 42] if reduce else None
    return Work("smp-1", "base", Asked.of(tiny_tokenizer(), Sample(MAIN, BRANCHES), each, last, sampling))


@contextmanager
def started(engine: Any, stuck_s: float = 60) -> Iterator[Stepper]:
    stepper = Stepper(engine, lambda *_: None, stuck_s, threads=1)
    try:
        yield stepper
    finally:
        stepper.stop()


class Engines:
    """Stands in for Serve's handle, which cannot die on command: real engines, each of which dies after so many steps.

    quietly: they say no more, as if all had been said.
    """

    def __init__(self, config: RopeConfig, lives: list[int], quietly: bool = False) -> None:
        self._config, self._lives, self._quietly = config, lives, quietly
        self.asked: list[Work] = []

    @property
    def decode(self) -> Any:
        return self

    def remote(self, work: Work) -> Any:
        self.asked.append(work)
        life = self._lives[len(self.asked) - 1] if len(self.asked) <= len(self._lives) else 10_000
        return _Steps(self._decode(work, life))

    async def _decode(self, work: Work, life: int) -> AsyncIterator[Packed | Refusal]:
        if life == 0:
            raise ActorDiedError
        with started(tiny_engine(self._config)) as stepper:
            try:
                number = stepper.begin(work, None)
            except UserError as error:
                yield Refusal(str(error))
                return
            places = stepper._engine.places(number)[: work.asked.tokens.branches]
            given = zip(self._prompts(work), work.asked.params, places, strict=True)
            yield packed(Step([], [Begun(branch, *each) for branch, each in enumerate(given)]))
            while (step := await stepper.next(number)) is not None:
                life -= 1
                if life == 0:
                    stepper.drop(number)
                    if self._quietly:
                        return
                    raise ActorDiedError
                yield packed(step)
            stepper.drop(number)

    @staticmethod
    def _prompts(work: Work) -> list[list[int]]:
        ends = work.asked.tokens.lengths.cumsum()
        return [work.asked.tokens.ids[start:end].tolist() for start, end in pairwise(ends)]


class _Steps:
    def __init__(self, steps: AsyncIterator[Any]) -> None:
        self._steps = steps

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._steps

    def cancel(self) -> None:
        pass


def heard(engines: Engines, asked: Work) -> tuple[list[Any], str, FrontMeters]:
    """Everything that is said, in order, by branch; how often branches began; the meters."""
    meters = FrontMeters()

    async def listen() -> list[Step]:
        return [step async for step in follow(engines, asked, meters)]  # type: ignore[arg-type]

    steps = asyncio.run(listen())
    events = [event for step in steps for event in step.events]
    told: list[Any] = [[], [], [], []]
    for each in events:
        told[each.branch].append((each.token, each.text, each.finish_reason, each.pos2d))
    return told, str([begun.branch for step in steps for begun in step.begun]), meters


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
@pytest.mark.parametrize("reduce", [False, True], ids=["", "reduced"])
@pytest.mark.parametrize("lives", [[1], [0, 0, 4, 2], [2, 2, 2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("quietly", [False, True], ids=["", "quietly"])
def test_nobody_notices_that_engines_die(config: RopeConfig, reduce: bool, lives: list[int], quietly: bool) -> None:
    whole = heard(Engines(config, []), work(reduce))
    parts = heard(Engines(config, lives, quietly), work(reduce))
    assert parts[:2] == whole[:2]
    assert parts[2].moved._value.get() >= 1


def test_a_sample_that_kills_every_engine_is_given_up() -> None:
    engines = Engines(ISOLATED, [0] * 100)
    with pytest.raises(EngineLost):
        heard(engines, work())
    assert 1 < len(engines.asked) < 20


def test_a_refused_sample_is_asked_for_once() -> None:
    engines = Engines(ISOLATED, [])
    asked = Asked.of(tiny_tokenizer(), Sample(MAIN, BRANCHES), None, None, {"max_new_tokens": 99999})
    with pytest.raises(RequestError, match=r"max_tokens=99999: .* exceed the model's"):
        heard(engines, Work("smp-1", "base", asked))
    assert len(engines.asked) == 1


def test_steps_that_take_too_long_end_in_a_timeout() -> None:
    ended = []

    async def slow() -> Any:
        try:
            yield Step([], [])
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def listen() -> list[Step]:
        return [step async for step in within(0.05, slow())]

    with pytest.raises(TimeoutError):
        asyncio.run(listen())
    assert ended


def failing_engine(act: Callable[[], object]) -> Any:
    engine = tiny_engine(ISOLATED)

    def fail(*_: Any) -> Any:
        act()
        raise ValueError("no such luck")

    engine.forward.__class__ = type("Failing", (type(engine.forward),), {"__call__": fail})
    return engine


UNHANDLED = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@UNHANDLED
def test_an_engine_that_fails_tells_everybody_and_takes_no_more() -> None:
    async def use() -> None:
        with started(failing_engine(lambda: None)) as stepper:
            number = stepper.begin(work(), None)
            with pytest.raises(Stuck, match="no such luck"):
                await asyncio.wait_for(stepper.next(number), 10)
            with pytest.raises(Stuck):
                stepper.begin(work(), None)
            with pytest.raises(Stuck):
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
            with pytest.raises(Stuck, match=r"more than 0.05 s"):
                stepper.check()
            go_on.set()
            with suppress(Stuck):
                await asyncio.wait_for(stepper.next(number), 10)

    asyncio.run(use())


def test_who_leaves_is_forgotten_by_the_engine() -> None:
    async def use() -> None:
        engine = tiny_engine(ISOLATED)
        with started(engine) as stepper:
            number = stepper.begin(work(max_new_tokens=200), None)
            await stepper.next(number)
            stepper.drop(number)
            assert not engine.holds(number)
            assert engine.load().live_branches == 0

    asyncio.run(use())


class Ahead(Engine):
    """Has computed its last step by the time that anybody looks at the one before, and tells of it later still."""

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
            sample = Work("smp-1", "base", Asked.of(tiny_tokenizer(), Sample([], [[5, 6]]), None, None, {"max_new_tokens": 2}))
            number = stepper.begin(sample, None)
            engine.computed.wait(10)  # and nobody listens meanwhile
            heard = []
            while (step := await stepper.next(number)) is not None:
                heard += [event.token for event in step.events]
                engine.tell.set()
            return heard

    assert len(asyncio.run(use())) == 2

"""The thread that steps an engine delivers every output, and every failure, to the readers of its samples."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from threading import Event, current_thread
from typing import Any

import pytest
from engine_loops import running_loop, sample_request
from engines import ISOLATED, tiny_engine
from tiny import tiny_tokenizer

from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event as EngineEvent
from parallelmind.engine.request import AddedSegments, Sample
from parallelmind.engine.tokenization import tokenize_branches, tokenize_request
from parallelmind.tree import MAIN
from serving.engine.loop import EngineLoop, EngineStuckError, RunningRequest
from serving.engine.messages import EngineRequest


def failing_engine(before_failure: Callable[[], object]) -> Any:
    """An engine whose forward pass calls the function and then raises."""
    engine = tiny_engine(ISOLATED)

    def fail(*_: Any) -> Any:
        before_failure()
        raise ValueError("no such luck")

    engine.runner.__class__ = type("Failing", (type(engine.runner),), {"__call__": fail})
    return engine


IGNORE_THREAD_EXCEPTION = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


async def read_to_end(loop: EngineLoop, running: RunningRequest) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    while (step := await asyncio.wait_for(loop.next_output(running), 10)) is not None:
        events += step.events
    return events


def test_a_failed_step_ends_its_samples_and_the_engine_goes_on() -> None:
    engine, fails = tiny_engine(ISOLATED), [False, True, False]

    def fail_once(*_: Any) -> None:
        if fails and fails.pop(0):
            raise RuntimeError("out of memory")

    async def run() -> tuple[list[EngineEvent], list[EngineEvent]]:
        with running_loop(engine) as loop:
            failed = await read_to_end(loop, await loop.submit(sample_request(reduce=True), None))
            loop.check_health()
            return failed, await read_to_end(loop, await loop.submit(sample_request(reduce=True), None))

    engine.model.register_forward_pre_hook(fail_once)
    failed, complete = asyncio.run(run())
    assert {event.branch: event.finish_reason for event in failed} == dict.fromkeys(range(4), "error")
    assert {event.error for event in failed if event.error} == {
        "the forward pass failed (RuntimeError: out of memory)"
    }
    assert {event.branch: event.finish_reason for event in complete} == dict.fromkeys(range(4), "length")


@IGNORE_THREAD_EXCEPTION
def test_an_engine_whose_steps_all_fail_fails_its_readers_and_rejects_further_requests() -> None:
    async def run() -> None:
        with running_loop(failing_engine(lambda: None)) as loop:
            for _ in range(2):
                events = await read_to_end(loop, await loop.submit(sample_request(), None))
                assert {event.finish_reason for event in events} == {"error"}
                loop.check_health()
            running = await loop.submit(sample_request(), None)
            with pytest.raises(EngineStuckError, match="no such luck"):
                await asyncio.wait_for(loop.next_output(running), 10)
            with pytest.raises(EngineStuckError):
                await loop.submit(sample_request(), None)
            with pytest.raises(EngineStuckError):
                loop.check_health()

    asyncio.run(run())


class PanicError(BaseException):
    """As a library that is written in Rust raises it: no subclass of Exception."""


@IGNORE_THREAD_EXCEPTION
def test_a_thread_that_ends_with_a_panic_fails_its_readers() -> None:
    """Before, its readers waited until the step counted as stuck."""

    def panic() -> None:
        raise PanicError("slice index starts at 1 but ends at 0")

    async def run() -> None:
        with running_loop(failing_engine(panic)) as loop:
            running = await loop.submit(sample_request(), None)
            with pytest.raises(EngineStuckError, match="slice index"):
                await read_to_end(loop, running)

    asyncio.run(run())


@IGNORE_THREAD_EXCEPTION
def test_an_engine_that_stays_in_a_step_is_not_healthy() -> None:
    end_step = Event()

    async def run() -> None:
        with running_loop(failing_engine(lambda: end_step.wait(10)), stuck_s=0.05) as loop:
            loop.check_health()
            running = await loop.submit(sample_request(), None)
            await asyncio.sleep(0.3)
            with pytest.raises(EngineStuckError, match=r"more than 0.05 s"):
                loop.check_health()
            end_step.set()
            with suppress(EngineStuckError):
                await asyncio.wait_for(loop.next_output(running), 10)

    asyncio.run(run())


def test_a_released_sample_leaves_the_engine() -> None:
    async def run() -> None:
        engine = tiny_engine(ISOLATED)
        with running_loop(engine) as loop:
            running = await loop.submit(sample_request(max_new_tokens=200), None)
            (number,) = running.numbers
            await loop.next_output(running)
            await asyncio.wrap_future(loop.release(running))
            assert not engine.has_sample(number)
            assert engine.stats().live_branches == 0

    asyncio.run(run())


class AheadEngine(Engine):
    """Computes its last step before the events of the previous one are read, and returns it later."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.computed, self.may_return = Event(), Event()

    def step(self) -> list[EngineEvent]:
        events = super().step()
        if not self.busy:
            self.computed.set()
            self.may_return.wait(10)
        return events


def test_a_sample_does_not_end_before_its_last_event_is_delivered() -> None:
    async def run() -> list[int | None]:
        engine = tiny_engine(ISOLATED, AheadEngine)
        assert isinstance(engine, AheadEngine)
        with running_loop(engine) as loop:
            sample, settings = Sample([], [[5, 6]]), {"max_new_tokens": 2}
            tokenized = tokenize_request(tiny_tokenizer(), sample, None, None, settings)
            running = await loop.submit(EngineRequest("smp-1", "base", [tokenized]), None)
            engine.computed.wait(10)  # no output is read until then
            tokens = []
            while (step := await loop.next_output(running)) is not None:
                tokens += [event.token for event in step.events]
                engine.may_return.set()
            return tokens

    assert len(asyncio.run(run())) == 2


class HeldLock:
    """An engine's lock that is held until `free`. waits: a call of the event loop's waits for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, engine.state_lock
        self.waits, self._free = Event(), Event()
        engine.state_lock = self  # type: ignore[assignment]

    def __enter__(self) -> None:
        if current_thread().name.startswith("engine-calls"):
            self.waits.set()
        assert self._free.wait(10)
        self._lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)

    def free(self) -> None:
        self._engine.state_lock = self._lock
        self._free.set()


def test_the_event_loop_goes_on_while_a_step_holds_the_lock() -> None:
    """The event loop frees the lock that each call waits for: a call within it would wait for ever."""

    async def run() -> None:
        engine = tiny_engine(ISOLATED)
        added = AddedSegments(tokenize_branches(engine.tokenizer, [[5]], {}), MAIN, False, "key")
        with running_loop(engine) as loop:
            running = await loop.submit(sample_request(max_new_tokens=400, lengths=(400, 400, 400)), None)
            for call in (
                lambda: loop.submit(sample_request(), None),
                lambda: loop.add(running, lambda number: [engine.join(number, [5])], added),
                lambda: loop.cancel(running, 0),
                lambda: loop.stats(),
                lambda: asyncio.wrap_future(loop.release(running)),
            ):
                held = HeldLock(engine)
                pending = asyncio.ensure_future(call())
                while not held.waits.is_set():
                    await asyncio.sleep(0)
                assert not pending.done()
                held.free()
                await asyncio.wait_for(pending, 10)

    asyncio.run(run())


def test_a_sample_whose_client_leaves_while_it_is_submitted_is_not_decoded() -> None:
    async def run() -> None:
        engine = tiny_engine(ISOLATED)
        with running_loop(engine) as loop:
            held = HeldLock(engine)
            submission = asyncio.ensure_future(loop.submit(sample_request(max_new_tokens=400), None))
            while not held.waits.is_set():
                await asyncio.sleep(0)
            submission.cancel()
            held.free()
            with suppress(asyncio.CancelledError):
                await submission
            while engine.busy or loop._readers:
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 20))

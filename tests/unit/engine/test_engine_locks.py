"""Calls return during a forward pass, sampling, the load of an adapter, and between pieces of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any
from unittest import mock

import pytest
from engines import ISOLATED, decode, run_to_end, saved_adapters, tiny_engine, tokens_by_branch

from parallelmind.engine import adapters
from parallelmind.engine.engine import Engine
from parallelmind.engine.fair_lock import FairLock
from parallelmind.engine.planner import Planner
from parallelmind.engine.request import Sample
from parallelmind.engine.unfinished_samples import _EVENTS_AT_ONCE
from parallelmind.model.adapter import read_saved

SAMPLE = Sample(list(range(50, 60)), [[5, 6], [7]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
_PATIENCE = 60  # seconds after which a call counts as blocked


class Held:
    """A function that reports that it was called, and waits until it is released."""

    def __init__(self) -> None:
        self.entered, self.released = Event(), Event()

    def __call__(self, *_: Any) -> None:
        self.entered.set()
        assert self.released.wait(_PATIENCE)


@contextmanager
def running(work: Callable[[], object]) -> Iterator[Thread]:
    """Run `work` in a thread, which has ended when the context ends."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(_PATIENCE)
    assert not thread.is_alive()
    assert not errors


def returns(call: Callable[[], Any]) -> Any:
    """The result of a call in a thread of its own, which must not block."""
    results: list[Any] = []
    with running(lambda: results.append(call())):
        pass
    return results[0]


@contextmanager
def held_step(engine: Engine, events: list[Any], held: Held) -> Iterator[None]:
    """A step that waits in `held`, wherever the caller put it."""
    with running(lambda: events.extend(engine.step())):
        assert held.entered.wait(_PATIENCE)
        try:
            yield
        finally:
            held.released.set()


def check_calls_return(engine: Engine, sample_id: int) -> tuple[int, int]:
    """Call everything that other threads may call; returns a new sample and a joined branch."""
    assert returns(engine.stats).running_samples == 1
    new = returns(lambda: engine.submit(SAMPLE, **SETTINGS))
    branch = returns(lambda: engine.join(sample_id, [9, 10], **SETTINGS))
    assert len(returns(lambda: engine.start_pos2d(sample_id))) == 3
    returns(lambda: engine.cancel(sample_id, 1))
    return new, branch


def check_outcome(engine: Engine, sample_id: int, new: int, branch: int, events: list[Any]) -> None:
    """The cancelled branch ends; all others decode what they decode undisturbed."""
    events = [*events, *run_to_end(engine)]
    tokens, expected = tokens_by_branch(events), decode(tiny_engine(ISOLATED), SAMPLE, **SETTINGS)
    reasons = {
        (event.sample, event.branch): event.finish_reason
        for event in events
        if event.finish_reason is not None
    }
    assert reasons[sample_id, 1] == "cancelled"
    assert tokens[sample_id, 0] == expected[0]
    assert [tokens[new, index] for index in range(2)] == expected
    assert len(tokens[sample_id, branch]) == SETTINGS["max_new_tokens"]


def test_calls_return_while_a_forward_pass_runs() -> None:
    engine, held, events = tiny_engine(ISOLATED), Held(), []
    sample_id = engine.submit(SAMPLE, **SETTINGS)
    events += engine.step()
    hook = engine.model.register_forward_pre_hook(held)
    with held_step(engine, events, held):
        new, branch = check_calls_return(engine, sample_id)
    hook.remove()
    check_outcome(engine, sample_id, new, branch, events)


def test_calls_return_while_tokens_are_sampled() -> None:
    engine, held, events = tiny_engine(ISOLATED), Held(), []
    sample_id = engine.submit(SAMPLE, **SETTINGS)
    events += engine.step()
    sample = engine.sample

    def sample_held(*args: Any) -> Any:
        held()
        return sample(*args)

    with mock.patch.object(engine, "sample", sample_held), held_step(engine, events, held):
        new, branch = check_calls_return(engine, sample_id)
    check_outcome(engine, sample_id, new, branch, events)


def test_steps_and_calls_go_on_while_an_adapter_is_read(tmp_path: Path) -> None:
    engine, held, events = tiny_engine(ISOLATED), Held(), []
    folder = saved_adapters(tmp_path)[0]
    sample_id = engine.submit(SAMPLE, **SETTINGS)

    def read_held(*args: Any) -> Any:
        held()
        return read_saved(*args)

    with (
        mock.patch.object(adapters, "read_saved", read_held),
        running(lambda: engine.load_adapter("a", folder)),
    ):
        assert held.entered.wait(_PATIENCE)
        events += returns(engine.step)
        new, branch = check_calls_return(engine, sample_id)
        held.released.set()
    check_outcome(engine, sample_id, new, branch, events)
    assert decode(engine, SAMPLE, adapter="a", **SETTINGS) != decode(engine, SAMPLE, **SETTINGS)


def test_calls_return_while_an_adapter_is_checked(tmp_path: Path) -> None:
    engine, held, events = tiny_engine(ISOLATED), Held(), []
    folder = saved_adapters(tmp_path)[0]
    sample_id = engine.submit(SAMPLE, **SETTINGS)
    events += engine.step()
    with running(lambda: engine.load_adapter("a", folder, check=held)):
        assert held.entered.wait(_PATIENCE)
        new, branch = check_calls_return(engine, sample_id)
        held.released.set()
    check_outcome(engine, sample_id, new, branch, events)


def test_an_adapter_is_read_during_a_forward_pass_and_installed_after_it(tmp_path: Path) -> None:
    engine, held, read, events = tiny_engine(ISOLATED), Held(), Event(), []
    folder = saved_adapters(tmp_path)[0]
    engine.submit(SAMPLE, **SETTINGS)

    def read_told(*args: Any) -> Any:
        saved = read_saved(*args)
        read.set()
        return saved

    hook = engine.model.register_forward_pre_hook(held)
    loading = running(lambda: engine.load_adapter("a", folder))
    with mock.patch.object(adapters, "read_saved", read_told), ExitStack() as ended_later:
        ended_later.callback(lambda: loading.__exit__(None, None, None))
        ended_later.enter_context(held_step(engine, events, held))
        loading.__enter__()
        assert read.wait(_PATIENCE)
        assert not hasattr(engine.model, "peft_config")
    hook.remove()
    assert "a" in engine.adapters._version_by_name


def test_a_thread_that_takes_the_lock_in_a_loop_lets_others_take_it() -> None:
    lock, taken = FairLock(), Event()

    def take() -> None:
        with lock:
            taken.set()

    with lock, lock:
        waiting = running(take)
        waiting.__enter__()
        while not lock._next.locked():
            sleep(0.001)
        assert not taken.is_set()
    with lock:
        assert taken.is_set()
    waiting.__exit__(None, None, None)


def test_a_fair_lock_is_free_after_an_error() -> None:
    lock = FairLock()
    with pytest.raises(RuntimeError), lock, lock:
        raise RuntimeError
    with running(lambda: lock.__exit__(lock.__enter__())):
        pass


class Between:
    """A call of another thread that comes while `function` runs for the first time.

    order: "called" when the call has returned, and a name for each time that the function has.
    """

    def __init__(self, engine: Engine, call: Callable[[], Any], function: Callable[..., Any]) -> None:
        self.order: list[str] = []
        self._lock, self._call, self._function = engine.state_lock, call, function
        self._thread: Thread | None = None

    def __call__(self, *args: Any) -> Any:
        if self._thread is None:
            self._thread = Thread(target=self._run, daemon=True)
            self._thread.start()
            while not self._lock._next.locked():
                sleep(0.001)
        result = self._function(*args)
        self.order.append(self._function.__name__)
        return result

    def _run(self) -> None:
        self._call()
        self.order.append("called")

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive()


def test_calls_get_in_between_the_samples_that_a_step_plans() -> None:
    engine, expected = tiny_engine(ISOLATED), decode(tiny_engine(ISOLATED), SAMPLE, **SETTINGS)
    samples = [engine.submit(SAMPLE, **SETTINGS) for _ in range(5)]
    events, late = [], list[int]()

    def call() -> None:
        with engine.state_lock:
            engine.cancel(samples[1])
            engine.cancel(samples[2], 0)
            late.append(engine.join(samples[3], [9, 10], **SETTINGS))
            samples.append(engine.submit(SAMPLE, **SETTINGS))

    between = Between(engine, call, Planner._adopt)
    with mock.patch.object(Planner, "_adopt", lambda *args: between(*args)):
        events += engine.step()
    between.join()
    assert between.order[:3] == ["_adopt", "called", "_adopt"]
    assert {group.id for group in engine.scheduler.running} == {samples[0], samples[4]}
    tokens = tokens_by_branch([*events, *run_to_end(engine)])
    whole = [tokens[samples[sample], branch] for sample in (0, 3, 4, 5) for branch in range(2)]
    assert whole == expected * 4
    assert tokens[samples[2], 1] == expected[1]
    assert len(tokens[samples[3], late[0]]) == SETTINGS["max_new_tokens"]
    assert engine.scheduler.block_manager.num_allocated == 0


def test_calls_get_in_between_the_events_of_a_step() -> None:
    engine = tiny_engine(ISOLATED)
    branches, events = [[5 + number] for number in range(2 * _EVENTS_AT_ONCE)], []
    sample = engine.submit(Sample([1, 2], branches), **SETTINGS)
    events += engine.step()
    between = Between(engine, lambda: engine.cancel(sample), engine.samples._emit)
    with mock.patch.object(engine.samples, "_emit", between):
        events += engine.step()
    between.join()
    events += run_to_end(engine)
    assert between.order == ["_emit"] * _EVENTS_AT_ONCE + ["called"]
    reasons = [event.finish_reason for event in events if event.finish_reason is not None]
    assert reasons == ["cancelled"] * len(branches)


def test_a_sample_is_built_without_the_lock() -> None:
    engine, held = tiny_engine(ISOLATED), Held()
    sample_id = engine.submit(SAMPLE, **SETTINGS)
    make_output = engine._make_output

    def make_held(*args: Any) -> Any:
        held()
        return make_output(*args)

    with (
        mock.patch.object(engine, "_make_output", make_held),
        running(lambda: engine.submit(SAMPLE, **SETTINGS)),
    ):
        assert held.entered.wait(_PATIENCE)
        engine.cancel(sample_id)
        events = engine.step()
        held.released.set()
    assert [event.finish_reason for event in events] == ["cancelled"] * 2
    assert len(tokens_by_branch(run_to_end(engine))) == 2

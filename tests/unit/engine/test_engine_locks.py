"""Calls of the engine return during a forward pass, sampling and the load of an adapter."""

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
from parallelmind.engine.request import Sample
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

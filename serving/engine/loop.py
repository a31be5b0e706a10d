"""The thread in which an engine computes, and the event loop in which its samples are waited for."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from time import monotonic, perf_counter

import parallelmind as pm
from serving.engine.messages import BranchStarted, EngineRequest, StepOutput

_NICE = 15  # at 5 whoever wakes up to answer waits some milliseconds for the engine's threads
_BEAT_S = 1.0
_SWITCH_S = (
    1e-4  # by default each of a step's thousand small calls waits 5 ms for whoever hands out what was said
)


class EngineStuckError(RuntimeError):
    """The engine has failed, or does not come back from a step; only a new one will help."""


class EngineLoop:
    """Steps an engine while it is busy. All methods are for the event loop that it was started in."""

    def __init__(
        self, engine: pm.Engine, timed: Callable[[float, float], None], stuck_s: float, threads: int
    ) -> None:
        """timed: is told the seconds of every step, in all and inside of the model. threads: to compute
        with.
        """
        self._engine, self._timed, self._stuck_s, self._threads = engine, timed, stuck_s, threads
        self._queues: dict[int, asyncio.Queue[StepOutput | None]] = {}
        self._wake = threading.Event()
        self._began: float | None = None  # when the step at work began
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    def begin(self, work: EngineRequest, adapter: str | None) -> int:
        """Queue a sample; returns the engine's number of it. Raises UserError as `Engine.enqueue`, and
        Stuck.
        """
        self.check()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
            self._thread.start()
        number = self._engine.enqueue(work.asked, adapter, work.progress)
        self._queues[number] = asyncio.Queue()
        self._wake.set()
        return number

    def tell_begun(self, number: int, begun: BranchStarted) -> None:
        self._queues[number].put_nowait(StepOutput([], [begun]))

    async def next(self, number: int) -> StepOutput | None:
        """What has been added to a sample since, now and then nothing; None at its end. Raises Stuck if the
        engine has failed.
        """
        queue = self._queues[number]
        try:
            async with asyncio.timeout(_BEAT_S):
                parts = [await queue.get()]
        except TimeoutError:  # says at least that somebody is there
            return StepOutput([], [])
        while not queue.empty():  # who comes late gets all at once
            parts.append(queue.get_nowait())
        if parts[-1] is None and len(parts) > 1:
            queue.put_nowait(parts.pop())
        self._raise_failure()
        steps = [part for part in parts if part is not None]
        if not steps:
            return None
        return StepOutput(
            [event for step in steps for event in step.events],
            [begun for step in steps for begun in step.begun],
        )

    def cancel(self, number: int, branch: int | None = None) -> None:
        """End a sample or a branch; whoever waits for it will hear of it."""
        self._engine.cancel(number, branch)
        self._wake.set()

    def drop(self, number: int) -> None:
        """Nobody waits for this sample any more."""
        del self._queues[number]
        self.cancel(number)

    def stop(self) -> None:
        """End the thread, after the step at work."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raises Stuck if the engine has failed or has been in one step for too long."""
        self._raise_failure()
        began = self._began
        if began is not None and monotonic() - began > self._stuck_s:
            raise EngineStuckError(f"one step has taken more than {self._stuck_s:g} s")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise EngineStuckError(f"the engine has failed: {self._failure}") from self._failure

    def _run(self) -> None:
        import torch

        assert self._loop is not None
        sys.setswitchinterval(_SWITCH_S)
        torch.set_num_threads(self._threads)  # OpenMP keeps the number for each thread that calls it
        if (
            sys.platform == "linux"
        ):  # where a thread has a priority of its own: on a busy machine the front goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            while not self._stopped:
                self._wake.wait()
                self._wake.clear()
                while self._engine.busy and not self._stopped:
                    self._loop.call_soon_threadsafe(self._hand_out, *self._step())
        except Exception as error:
            self._failure = error
            self._loop.call_soon_threadsafe(self._end_all)
            raise

    def _step(self) -> tuple[dict[int, list[pm.Event]], set[int]]:
        """What has been said, by sample, and which samples are over; a moment later the next step may have
        ended others.
        """
        self._began, began, inside = monotonic(), perf_counter(), self._engine.seconds_in_model
        events = self._engine.step()
        self._began = None
        self._timed(perf_counter() - began, self._engine.seconds_in_model - inside)
        said: dict[int, list[pm.Event]] = defaultdict(list)
        for event in events:
            said[event.sample].append(event)
        return said, {number for number in said if self._engine.is_finished(number)}

    def _hand_out(self, said: dict[int, list[pm.Event]], over: set[int]) -> None:
        for number, events in said.items():
            queue = self._queues.get(number)
            if queue is None:  # whoever waited has gone
                continue
            queue.put_nowait(StepOutput(events, []))
            if number in over:
                queue.put_nowait(None)

    def _end_all(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(None)

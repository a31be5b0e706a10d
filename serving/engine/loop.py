"""The thread that steps the engine, and the queues through which its outputs reach the event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter
from typing import Any, TypeVar

import parallelmind as pm
from parallelmind.engine.request import AddedSegments
from parallelmind.engine.scheduler import EngineStats
from serving.engine.messages import BranchStarted, EngineRequest, StepOutput
from serving.observability.log import log

# With a niceness of 5 the event loop still waits some milliseconds for the engine's threads.
_NICENESS = 15
_HEARTBEAT_S = 1.0
_MAX_FAILED_STEPS = 3  # in a row, none of which computed anything: after that the engine itself is the cause
# With the default of 5 ms each of the thousand short calls of a step may wait 5 ms for the event loop.
_SWITCH_INTERVAL_S = 1e-4


ResultT = TypeVar("ResultT")


def lower_priority() -> None:
    """Let the event loop of this process go before the calling thread, where threads have priorities."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class EngineStuckError(RuntimeError):
    """Every step of the engine fails, or one step takes too long. Only a new replica helps."""


@dataclass(eq=False, slots=True)
class RunningRequest:
    """A request in the engine.

    first_branches: for each of its samples, by the engine's number, the index of its first branch in the
        request. started: the segments that started when it was submitted.
        num_running: samples that have not ended. outputs: what is not read yet; None is the end.
    """

    first_branches: dict[int, int] = field(default_factory=dict)
    started: list[BranchStarted] = field(default_factory=list)
    added: list[AddedSegments] = field(default_factory=list)
    num_running: int = 0
    outputs: asyncio.Queue[StepOutput | None] = field(default_factory=asyncio.Queue)

    @property
    def numbers(self) -> list[int]:
        """The engine's numbers of the samples."""
        return list(self.first_branches)

    def add(self, number: int, first_branch: int) -> None:
        """Add a sample."""
        self.first_branches[number] = first_branch
        self.num_running += 1

    def put(self, number: int, events: list[pm.Event], has_ended: bool) -> None:
        """Add the events of one of the samples, and its end."""
        if first := self.first_branches[number]:
            events = [event._replace(branch=first + event.branch) for event in events]
        self.outputs.put_nowait(StepOutput(events))
        self.num_running -= has_ended
        if not self.num_running:
            self.outputs.put_nowait(None)

    def announce(self, step: StepOutput) -> None:
        """Add segments that the sample has got, before their tokens."""
        self.added += step.added
        self.outputs.put_nowait(step)

    def find(self, branch: int) -> tuple[int, int]:
        """The number of the sample that a branch is in, and its index there."""
        firsts = list(self.first_branches.values())
        index = max(bisect_right(firsts, branch) - 1, 0)
        return self.numbers[index], branch - firsts[index]


class EngineLoop:
    """Step an engine in a thread while it has work.

    A step that raises has ended its samples with an error; the others continue.
    All methods are called from the event loop that called `submit` first, which none of them blocks: calls of
    the engine, which take its lock, run in a thread, one after another.
    """

    def __init__(
        self, engine: pm.Engine, on_step: Callable[[float, float], None], stuck_s: float, num_threads: int
    ) -> None:
        """on_step: called after every step with its seconds in total and in the model.
        stuck_s: seconds in one step after which the engine counts as stuck.
        num_threads: threads that torch computes with.
        """
        self._engine, self._on_step = engine, on_step
        self._stuck_s, self._num_threads = stuck_s, num_threads
        engine.samples.on_fork = self._announce_fork
        self._readers: dict[int, RunningRequest] = {}  # by the number of each sample
        self._calls = ThreadPoolExecutor(1, "engine-calls")
        self._wake = threading.Event()
        self._step_started_at: float | None = None
        self._num_failed_steps = 0
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    async def submit(self, request: EngineRequest, adapter: str | None) -> RunningRequest:
        """Queue the samples of a request; choices that do not fit the cache together are divided.

        Raises UserError as `Engine.enqueue` does, and queues none of them then, and EngineStuckError.
        """
        self.check_health()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
            self._thread.start()
        submission = self._loop.run_in_executor(self._calls, self._submit, request, adapter)
        try:
            return await asyncio.shield(submission)
        except asyncio.CancelledError:  # the caller has left and does not read the output
            submission.add_done_callback(self._release_submitted)
            raise

    def _submit(self, request: EngineRequest, adapter: str | None) -> RunningRequest:
        samples = [part for sample in request.samples for part in self._engine.divide(sample)]
        if len(samples) > 1:  # a branch that is added would take the index of one of the next sample
            samples = [sample.without_forks() for sample in samples]
        request, running = replace(request, samples=samples), RunningRequest()
        with self._engine.state_lock:  # a sample may end within the next millisecond
            try:
                for first_branch, sample, resume in request.unfinished():
                    number = self._engine.enqueue(sample, adapter, resume)
                    running.add(number, first_branch)
                    self._readers[number] = running
            except pm.UserError:
                self.release(running)
                raise
            running.started += self._started_branches(running)
        self._wake.set()
        return running

    def _started_branches(self, running: RunningRequest, first: int = 0) -> list[BranchStarted]:
        """The segments that have started. first: index of the first one that is looked at."""
        return [
            BranchStarted(offset + index, pos2d)
            for number, offset in running.first_branches.items()
            if self._engine.has_sample(number)
            for index, pos2d in enumerate(self._engine.start_pos2d(number))
            if pos2d is not None and offset + index >= first
        ]

    def _release_submitted(self, submission: asyncio.Future[RunningRequest]) -> None:
        if not submission.cancelled() and submission.exception() is None:
            self.release(submission.result())

    async def add(
        self, running: RunningRequest, add: Callable[[int], list[int]], added: AddedSegments
    ) -> list[int]:
        """Add segments to a request of one sample; returns the indices that `add` returns.

        add: adds them to the sample with a number in the engine. They are part of the output, with their
        starts. Raises UserError as `add` does.
        """
        return await self._call(self._add, running, add, added)

    def _add(
        self, running: RunningRequest, add: Callable[[int], list[int]], added: AddedSegments
    ) -> list[int]:
        assert self._loop is not None, "the request runs"
        (number,) = running.numbers
        with self._engine.state_lock:
            indices = add(number)
            step = StepOutput([], self._started_branches(running, first=indices[0]), [added])
            # Before the lock is free: the first token of a segment must not overtake its start.
            self._loop.call_soon_threadsafe(running.announce, step)
        self._wake.set()
        return indices

    def _announce_fork(self, number: int, added: AddedSegments) -> None:
        """Announce the fork that a model wrote. Called by a step, under the engine's lock."""
        assert self._loop is not None, "the request runs"
        running = self._readers.get(number)
        if running is not None:  # the reader has not left
            self._loop.call_soon_threadsafe(running.announce, StepOutput([], added=[added]))

    async def stats(self) -> EngineStats:
        """The engine's current load."""
        return await self._call(self._engine.stats)

    async def _call(self, function: Callable[..., ResultT], *args: Any) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._calls, function, *args)

    async def next_output(self, running: RunningRequest) -> StepOutput | None:
        """Everything added to a request since the last call; None at its end.

        Returns an empty output every second without one, as a sign of life. Raises EngineStuckError if the
        engine failed.
        """
        queue = running.outputs
        try:
            async with asyncio.timeout(_HEARTBEAT_S):
                outputs = [await queue.get()]
        except TimeoutError:
            return StepOutput([])
        while not queue.empty():  # a slow reader gets all outputs at once
            outputs.append(queue.get_nowait())
        if outputs[-1] is None and len(outputs) > 1:
            queue.put_nowait(outputs.pop())
        self._raise_failure()
        steps = [output for output in outputs if output is not None]
        if not steps:
            return None
        return StepOutput(
            [event for step in steps for event in step.events],
            [started for step in steps for started in step.started],
            [added for step in steps for added in step.added],
        )

    async def cancel(self, running: RunningRequest, branch: int | None = None) -> None:
        """End a request or one of its branches. The end appears in the request's output."""
        await self._call(self._cancel, running, branch)

    def _cancel(self, running: RunningRequest, branch: int | None = None) -> None:
        samples = [(number, None) for number in running.numbers] if branch is None else [running.find(branch)]
        for number, index in samples:
            self._engine.cancel(number, index)
        self._wake.set()

    def release(self, running: RunningRequest) -> Future[None]:
        """End a request whose output is no longer read."""
        for number in running.numbers:
            del self._readers[number]
        return self._calls.submit(self._cancel, running)

    def stop(self) -> None:
        """End the thread after the current step."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def check_health(self) -> None:
        """Raise EngineStuckError if the engine failed or its current step takes too long."""
        self._raise_failure()
        started_at = self._step_started_at
        if started_at is not None and monotonic() - started_at > self._stuck_s:
            raise EngineStuckError(f"one step has taken more than {self._stuck_s:g} s")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise EngineStuckError(f"the engine failed: {self._failure}") from self._failure

    def _run(self) -> None:
        assert self._loop is not None
        self._configure_thread()
        try:
            while not self._stopped:
                self._wake.wait()
                self._wake.clear()
                while self._engine.busy and not self._stopped:
                    self._loop.call_soon_threadsafe(self._dispatch, *self._step())
        except BaseException as error:  # a library in Rust panics with one that is no Exception
            self._failure = error
            self._loop.call_soon_threadsafe(self._close_all)
            raise

    def _configure_thread(self) -> None:
        import torch

        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        torch.set_num_threads(self._num_threads)  # OpenMP keeps the number per calling thread
        lower_priority()

    def _step(self) -> tuple[dict[int, list[pm.Event]], set[int]]:
        """Returns the events by sample, and the samples that ended.

        Both are taken here: by the time they are dispatched the next step may have ended other samples.
        """
        self._step_started_at = monotonic()
        started_at, model_seconds = perf_counter(), self._engine.seconds_in_model
        events = self._step_engine()
        self._step_started_at = None
        self._on_step(perf_counter() - started_at, self._engine.seconds_in_model - model_seconds)
        events_by_sample: dict[int, list[pm.Event]] = defaultdict(list)
        for event in events:
            events_by_sample[event.sample].append(event)
        return events_by_sample, {number for number in events_by_sample if self._engine.is_finished(number)}

    def _step_engine(self) -> list[pm.Event]:
        """The events of a step, also of one that raises. Raises what the last of many failed steps raised."""
        model_seconds = self._engine.seconds_in_model
        try:
            return self._engine.step()
        except Exception:
            self._num_failed_steps += 1
            if self._num_failed_steps == _MAX_FAILED_STEPS:
                raise
            log.exception("a step of the engine failed; its samples ended with an error")
            return self._engine.take_events()
        finally:
            if self._engine.seconds_in_model > model_seconds:
                self._num_failed_steps = 0

    def _dispatch(self, events_by_sample: dict[int, list[pm.Event]], ended: set[int]) -> None:
        for number, events in events_by_sample.items():
            running = self._readers.get(number)
            if running is not None:  # the reader has not left
                running.put(number, events, number in ended)

    def _close_all(self) -> None:
        for running in set(self._readers.copy().values()):  # a call may be adding another
            running.outputs.put_nowait(None)

"""A sample whose engine is lost is finished by another one, and its client does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from engine_loops import BRANCHES, MAIN, running_loop, sample_request
from engines import COLUMNAR, ISOLATED, tiny_engine
from ray.exceptions import ActorDiedError
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.output import Event
from parallelmind.engine.request import AddedSegments, ResumeState, Sample, Segment, TokenizedRequest
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError
from parallelmind.layout import Tokens
from parallelmind.tree import Tree
from serving.engine.messages import (
    BranchStarted,
    EngineRequest,
    PackedStep,
    RejectedRequest,
    StepOutput,
    StreamKey,
    pack_step,
    unpack_step,
)
from serving.ingress import failover
from serving.ingress.failover import RequestReplay, stream_with_failover, with_deadline
from serving.ingress.step_receiver import StepReceiver
from serving.observability.metrics import IngressMetrics
from serving.protocol.branches_response import BranchTracker
from serving.protocol.errors import EngineLostError, RequestError

TIMEOUT_S = 30


class StubStream:
    """Stands for the response of a streaming call. cancelled: whether its reader has cancelled the call."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        self.cancelled = True


class DyingEngines:
    """Stands for Serve's handle: real engines, each of which dies after a given number of steps.

    quietly: a dying engine ends its stream as if the sample had finished.
    """

    def __init__(self, config: RopeConfig, lifetimes: list[int], quietly: bool = False) -> None:
        self._config, self._lifetimes, self._quietly = config, lifetimes, quietly
        self.requests: list[EngineRequest] = []
        self.streams: list[StubStream] = []

    @property
    def generate(self) -> Any:
        return self

    def remote(self, request: EngineRequest, _: StreamKey) -> StubStream:
        self.requests.append(request)
        number = len(self.requests)
        lifetime = self._lifetimes[number - 1] if number <= len(self._lifetimes) else 10_000
        self.streams.append(StubStream(self._messages(request, lifetime)))
        return self.streams[-1]

    async def _messages(
        self, request: EngineRequest, lifetime: int
    ) -> AsyncIterator[PackedStep | RejectedRequest]:
        if lifetime == 0:
            raise ActorDiedError
        with running_loop(tiny_engine(self._config)) as loop:
            try:
                running = await loop.submit(request, None)
            except UserError as error:
                yield RejectedRequest(str(error))
                return
            version = request.adapter_version or f"version {len(self.requests)}"
            yield pack_step(StepOutput([], running.started, adapter_version=version))
            while (step := await loop.next_output(running)) is not None:
                lifetime -= 1
                if lifetime == 0:
                    loop.release(running)
                    if self._quietly:
                        return
                    raise ActorDiedError
                yield pack_step(step)
            loop.release(running)


class SilentEngines:
    """Engines that each send the given messages; all but the last engine then send nothing any more."""

    def __init__(self, *messages: list[StepOutput]) -> None:
        self._remaining = list(messages)
        self.streams: list[StubStream] = []

    @property
    def generate(self) -> Any:
        return self

    def remote(self, _: EngineRequest, key: StreamKey) -> StubStream:
        self.streams.append(StubStream(self._messages(self._remaining.pop(0))))
        return self.streams[-1]

    async def _messages(self, steps: list[StepOutput]) -> AsyncIterator[PackedStep]:
        for step in steps:
            yield pack_step(step)
        if self._remaining:
            await asyncio.Future()


def follow(engines: Any, request: EngineRequest) -> tuple[list[Any], str, IngressMetrics]:
    """The tokens, texts and ends of every segment; where each segment starts; the metrics."""
    metrics, tracker = IngressMetrics(), BranchTracker(request)

    async def collect() -> list[StepOutput]:
        return [step async for step in stream_with_failover(engines, request, metrics, StepReceiver())]

    steps = asyncio.run(asyncio.wait_for(collect(), TIMEOUT_S))
    starts = [(start.index, start.time) for step in steps for start in tracker.new_branches(step)]
    outputs: list[Any] = [[] for _ in tracker.paths]
    for event in (event for step in steps for event in step.events):
        outputs[event.branch].append((event.token, event.text, event.finish_reason, event.pos2d))
    return outputs, str(sorted(starts)), metrics


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
@pytest.mark.parametrize("reduce", [False, True], ids=["", "reduced"])
@pytest.mark.parametrize("lifetimes", [[1], [0, 0, 4, 2], [2, 2, 2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("quietly", [False, True], ids=["", "quietly"])
def test_the_output_does_not_depend_on_engines_that_die(
    config: RopeConfig, reduce: bool, lifetimes: list[int], quietly: bool
) -> None:
    undisturbed = follow(DyingEngines(config, []), sample_request(reduce))
    resumed = follow(DyingEngines(config, lifetimes, quietly), sample_request(reduce))
    assert resumed[:2] == undisturbed[:2]
    assert resumed[2].moved_samples._value.get() >= 1


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
@pytest.mark.parametrize("lifetimes", [[1], [3, 2, 2]], ids=str)
def test_the_samples_of_a_request_do_not_depend_on_engines_that_die(
    config: RopeConfig, lifetimes: list[int]
) -> None:
    """The first sample ends after one step, while the others go on."""
    settings = {"max_new_tokens": 1, "ignore_eos": True, "seed": 3}
    short = tokenize_request(tiny_tokenizer(), Sample([], [MAIN]), None, None, settings)
    request = EngineRequest("cmpl-1", "base", [short, *sample_request().samples])
    undisturbed = follow(DyingEngines(config, []), request)
    assert list(map(len, undisturbed[0])) == [1, 9, 4, 6]
    assert undisturbed[1] == "[(0, 0), (1, 20), (2, 20), (3, 20)]"
    resumed = follow(DyingEngines(config, lifetimes), request)
    assert resumed[:2] == undisturbed[:2]


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
@pytest.mark.parametrize("lifetimes", [[1], [2, 2, 3]], ids=str)
def test_a_question_about_documents_does_not_depend_on_engines_that_die(
    config: RopeConfig, lifetimes: list[int]
) -> None:
    request = sample_request(reduce=True, lengths=[0, 0, 0])
    undisturbed = follow(DyingEngines(config, []), request)
    outputs, started, _ = undisturbed
    assert [event[:3] for branch in outputs[:3] for event in branch] == [(None, "", "length")] * 3
    assert (len(outputs[3]), started) == (5, "[(0, 20), (1, 20), (2, 20), (3, 32)]")
    resumed = follow(DyingEngines(config, lifetimes), request)
    assert resumed[:2] == undisturbed[:2]


TREE = Sample(
    MAIN,
    [
        Segment(
            BRANCHES[0],
            [Segment([21], sampling={"max_new_tokens": 0}), Segment([22, 23], [[30]])],
            reduce=[24],
        ),
        BRANCHES[1],
    ],
    reduce=Segment([41, 42], [[27], [28, 29]]),
)


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
@pytest.mark.parametrize("lifetimes", [[2], [4, 4, 4], [7, 2, 6]], ids=str)
def test_a_tree_does_not_depend_on_engines_that_die(config: RopeConfig, lifetimes: list[int]) -> None:
    """A segment that is only read starts and ends in one step; the reduce reads it after every failure."""
    settings = {"temperature": 1.5, "seed": 3, "ignore_eos": True, "max_new_tokens": 4}
    request = EngineRequest("smp-1", "base", [tokenize_request(tiny_tokenizer(), TREE, None, None, settings)])
    undisturbed = follow(DyingEngines(config, []), request)
    resumed = follow(DyingEngines(config, lifetimes), request)
    assert resumed[:2] == undisturbed[:2]
    assert resumed[2].moved_samples._value.get() >= 1
    assert all(branch[-1][2] for branch in resumed[0])


def test_segments_that_were_added_are_part_of_the_resumed_request() -> None:
    request = sample_request()
    replay, params = RequestReplay(request), request.samples[0].params[0]
    added = AddedSegments(
        TokenizedRequest(
            Tokens.of_tree([[], [60], [61]], Tree(np.array([-1, 0, 1]), np.zeros(3, bool))), [params] * 2
        ),
        1,
        as_reduce=False,
        key="mine",
    )
    for step in (
        StepOutput([], [BranchStarted(index, (index, 20)) for index in range(3)], adapter_version=""),
        StepOutput([Event(0, "a", 65, pos2d=(1, 23)), Event(0, "", None, "forked", pos2d=(1, 20))]),
        StepOutput([], [BranchStarted(3, (4, 24))], [added]),
        StepOutput([Event(3, "b", 66, "stop", pos2d=(4, 25)), Event(4, "c", 67, pos2d=(5, 27))]),
    ):
        replay.record(pack_step(step))
    resumed = replay.remaining_request()
    assert resumed.samples[0].tokens.tree.parents.tolist() == [-1, 0, 0, 0, 1, 4]
    assert resumed.samples[0].tokens.split()[4:] == [[60], [61]]
    assert resumed.added == {"mine": [3]}
    assert resumed.resume == ResumeState(
        [20, 20, 20, 24, 26], [[65], [], [], [66], [67]], ["forked", None, None, "stop", None]
    )


class EnginesThatSkipReduce(DyingEngines):
    """The first engine closes its stream when all branches but the reduce branch have finished."""

    async def _messages(
        self, request: EngineRequest, lifetime: int
    ) -> AsyncIterator[PackedStep | RejectedRequest]:
        num_finished = 0
        async for message in super()._messages(request, lifetime):
            yield message
            assert not isinstance(message, RejectedRequest)
            num_finished += sum(event.finish_reason is not None for event in unpack_step(message).events)
            if len(self.requests) == 1 and num_finished == len(BRANCHES):
                return


def test_a_stream_that_closes_before_the_reduce_branch_starts_is_resumed() -> None:
    engines = EnginesThatSkipReduce(ISOLATED, [])
    resumed, _, _ = follow(engines, sample_request(reduce=True))
    undisturbed, _, _ = follow(DyingEngines(ISOLATED, []), sample_request(reduce=True))
    assert len(engines.requests) == 2
    assert resumed == undisturbed


def test_a_sample_is_resumed_with_the_adapter_version_that_it_started_with() -> None:
    engines = DyingEngines(ISOLATED, [0, 3, 2])
    follow(engines, sample_request())
    versions = [request.adapter_version for request in engines.requests]
    assert versions == [None, None, "version 2", "version 2"]


def test_a_sample_whose_engines_do_not_begin_is_given_up() -> None:
    engines = DyingEngines(ISOLATED, [0] * 100)
    with pytest.raises(EngineLostError):
        follow(engines, sample_request())
    assert 1 < len(engines.requests) < 20


@pytest.mark.parametrize("lifetimes", [[1] * 100, [3, *[1] * 100]], ids=["at once", "at its third token"])
def test_a_sample_that_kills_two_engines_is_not_given_to_a_third(lifetimes: list[int]) -> None:
    engines = DyingEngines(ISOLATED, lifetimes)
    with pytest.raises(RequestError) as error:
        follow(engines, sample_request())
    assert (error.value.status_code, error.value.info.code) == (500, "engine_killed")
    assert error.value.headers == {"x-should-retry": "false"}
    assert len(engines.requests) == 2


def test_a_rejected_request_is_not_retried() -> None:
    engines = DyingEngines(ISOLATED, [])
    tokenized = tokenize_request(
        tiny_tokenizer(), Sample(MAIN, BRANCHES), None, None, {"max_new_tokens": 99999}
    )
    with pytest.raises(RequestError, match=r"max_tokens=99999: .* exceed the model's"):
        follow(engines, EngineRequest("smp-1", "base", [tokenized]))
    assert len(engines.requests) == 1


def test_closing_the_reader_cancels_the_engines_stream() -> None:
    engines = DyingEngines(ISOLATED, [])

    async def read_one_step() -> None:
        steps = stream_with_failover(engines, sample_request(), IngressMetrics(), StepReceiver())  # type: ignore[arg-type]
        await anext(steps)
        assert [stream.cancelled for stream in engines.streams] == [False]
        await steps.aclose()

    asyncio.run(asyncio.wait_for(read_one_step(), TIMEOUT_S))
    assert [stream.cancelled for stream in engines.streams] == [True]


def test_the_stream_of_a_lost_engine_is_cancelled_before_another_one_resumes() -> None:
    engines = DyingEngines(ISOLATED, [2, 2])
    follow(engines, sample_request())
    assert len(engines.streams) == 3
    assert all(stream.cancelled for stream in engines.streams)


def steps_of_one_engine() -> list[StepOutput]:
    """Everything that an engine sends for `sample_request`."""

    async def collect() -> list[StepOutput]:
        steps = stream_with_failover(
            DyingEngines(ISOLATED, []), sample_request(), IngressMetrics(), StepReceiver()
        )  # type: ignore[arg-type]
        return [step async for step in steps]

    return asyncio.run(collect())


@pytest.mark.parametrize("sent", [0, 1, 3], ids=["at the start", "after the branches start", "midway"])
def test_an_engine_that_sends_nothing_is_not_waited_for_without_a_limit(
    monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    steps = steps_of_one_engine()
    limit = "SILENCE_TIMEOUT_S" if sent else "FIRST_MESSAGE_TIMEOUT_S"
    monkeypatch.setattr(failover, limit, 0.05)
    rest = steps[sent:] if sent else steps
    engines = SilentEngines(steps[:sent], rest)
    outputs, _, metrics = follow(engines, sample_request())
    assert outputs == follow(SilentEngines(steps), sample_request())[0]
    assert [stream.cancelled for stream in engines.streams] == [True, True]
    assert metrics.moved_samples._value.get() == (sent > 0)


def test_steps_that_take_too_long_end_in_a_timeout() -> None:
    closed = []

    async def slow_steps() -> Any:
        try:
            yield StepOutput([])
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def collect() -> list[StepOutput]:
        return [step async for step in with_deadline(0.05, slow_steps())]

    with pytest.raises(TimeoutError):
        asyncio.run(collect())
    assert closed

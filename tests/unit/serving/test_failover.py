"""A sample whose engine dies is ended by another one, and whoever follows it does not notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED, tiny_engine
from ray.exceptions import ActorDiedError
from stepping import BRANCHES, MAIN, started, work
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.request import Sample
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError
from serving.engine.messages import BranchStarted, EngineRequest, Packed, RejectedRequest, StepOutput, packed
from serving.ingress.failover import follow, within
from serving.observability.metrics import IngressMetrics
from serving.protocol.errors import EngineLostError, RequestError


class Engines:
    """Stands in for Serve's handle, which cannot die on command: real engines, each of which dies after so
    many steps.

    quietly: they say no more, as if all had been said.
    """

    def __init__(self, config: RopeConfig, lives: list[int], quietly: bool = False) -> None:
        self._config, self._lives, self._quietly = config, lives, quietly
        self.asked: list[EngineRequest] = []

    @property
    def decode(self) -> Any:
        return self

    def remote(self, work: EngineRequest) -> Any:
        self.asked.append(work)
        life = self._lives[len(self.asked) - 1] if len(self.asked) <= len(self._lives) else 10_000
        return _Steps(self._decode(work, life))

    async def _decode(self, work: EngineRequest, life: int) -> AsyncIterator[Packed | RejectedRequest]:
        if life == 0:
            raise ActorDiedError
        with started(tiny_engine(self._config)) as stepper:
            try:
                number = stepper.begin(work, None)
            except UserError as error:
                yield RejectedRequest(str(error))
                return
            places = stepper._engine.start_pos2d(number)[: work.asked.tokens.branches]
            given = zip(work.asked.tokens.split()[1:], work.asked.params, places, strict=True)
            version = work.version or f"version {len(self.asked)}"
            yield packed(
                StepOutput([], [BranchStarted(branch, *each) for branch, each in enumerate(given)], version)
            )
            while (step := await stepper.next(number)) is not None:
                life -= 1
                if life == 0:
                    stepper.drop(number)
                    if self._quietly:
                        return
                    raise ActorDiedError
                yield packed(step)
            stepper.drop(number)


class _Steps:
    def __init__(self, steps: AsyncIterator[Any]) -> None:
        self._steps = steps

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._steps

    def cancel(self) -> None:
        pass


def heard(engines: Engines, asked: EngineRequest) -> tuple[list[Any], str, IngressMetrics]:
    """Everything that is said, in order, by branch; how often branches began; the meters."""
    meters = IngressMetrics()

    async def listen() -> list[StepOutput]:
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
def test_nobody_notices_that_engines_die(
    config: RopeConfig, reduce: bool, lives: list[int], quietly: bool
) -> None:
    whole = heard(Engines(config, []), work(reduce))
    parts = heard(Engines(config, lives, quietly), work(reduce))
    assert parts[:2] == whole[:2]
    assert parts[2].moved._value.get() >= 1


def test_a_sample_goes_on_with_the_version_that_it_has_begun_with() -> None:
    engines = Engines(ISOLATED, [0, 3, 2])
    heard(engines, work())
    assert [asked.version for asked in engines.asked] == [None, None, "version 2", "version 2"]


@pytest.mark.parametrize("life", [0, 1], ids=["before a word", "once it has begun"])
def test_a_sample_that_kills_every_engine_is_given_up(life: int) -> None:
    engines = Engines(ISOLATED, [life] * 100)
    with pytest.raises(EngineLostError):
        heard(engines, work())
    assert 1 < len(engines.asked) < 20


def test_a_refused_sample_is_asked_for_once() -> None:
    engines = Engines(ISOLATED, [])
    asked = tokenize_request(tiny_tokenizer(), Sample(MAIN, BRANCHES), None, None, {"max_new_tokens": 99999})
    with pytest.raises(RequestError, match=r"max_tokens=99999: .* exceed the model's"):
        heard(engines, EngineRequest("smp-1", "base", asked))
    assert len(engines.asked) == 1


def test_steps_that_take_too_long_end_in_a_timeout() -> None:
    ended = []

    async def slow() -> Any:
        try:
            yield StepOutput([], [])
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def listen() -> list[StepOutput]:
        return [step async for step in within(0.05, slow())]

    with pytest.raises(TimeoutError):
        asyncio.run(listen())
    assert ended

"""The next step begins before the tokens of a step are read, and gives the tokens that it would give later.

FlexAttention runs uncompiled on a CPU here, which computes what is ahead at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from engines import ISOLATED, run_to_end, step_interrupted, tiny_engine
from flexing import flex_decoding, flex_on_cpu

from parallelmind.engine.engine import Engine
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.output import Event
from parallelmind.engine.request import Sample
from parallelmind.engine.sampler import PendingTokens

MAIN = list(range(50, 90))
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 2.0, "seed": 3},
    "by the text so far": {"repetition_penalty": 1.5, "logprobs": 2, "logit_bias": {7: 1.0}},
    "grammar": {"grammar": {"regex": "[ab]{3,9}"}, "temperature": 1.5, "seed": 1},
}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Forward passes and reads, in the order in which they happen; decoding is that of an accelerator."""
    calls: list[str] = []

    def log(owner: type[object], name: str, called: str) -> None:
        original = getattr(owner, name)

        def logged(*args: Any) -> Any:
            calls.append(called)
            return original(*args)

        monkeypatch.setattr(owner, name, logged)

    log(ModelRunner, "__call__", "run")
    log(PendingTokens, "read", "read")
    with flex_on_cpu(), flex_decoding():
        yield calls


def without_rounding(events: list[Event]) -> list[tuple[Any, ...]]:
    return [(event.sample, event.branch, event.token, event.text, event.finish_reason) for event in events]


def test_the_next_step_begins_before_the_tokens_of_this_one_are_read(order: list[str]) -> None:
    """The first pass computes prompts, after which it is not known yet what is next."""
    engine = tiny_engine(ISOLATED)
    engine.submit(Sample(MAIN[:3], [[8], [9]]), max_new_tokens=5, ignore_eos=True)
    run_to_end(engine)
    assert order == ["run", "read", "run", "run", "read", "run", "read", "run", "read", "read"]


def decode_staggered(engine: Engine, **settings: Any) -> list[Event]:
    """Samples that come and end at different steps, the first one longer than a block."""
    events = []
    for number in range(4):
        prompts = [[number + 3 + branch] * (1 + branch) for branch in range(1 + number)]
        lengths = [{"max_new_tokens": 24 - 4 * branch - 2 * number} for branch in range(len(prompts))]
        own = {**settings, **({"stop": ["e"]} if number == 2 and "grammar" not in settings else {})}
        engine.submit(Sample(MAIN[: 11 * number], prompts), per_branch=lengths, **own)
        for _ in range(4):
            events += engine.step()
    return events + run_to_end(engine)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_an_engine_that_does_not_look_ahead(
    name: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = without_rounding(decode_staggered(tiny_engine(ISOLATED, cache_tokens=512), **SETTINGS[name]))
    num_ahead = [*pairwise(order)].count(("run", "run"))
    monkeypatch.setattr(ModelRunner, "computes_ahead", False)
    expected = decode_staggered(tiny_engine(ISOLATED, cache_tokens=512), **SETTINGS[name])
    assert ahead == without_rounding(expected)
    assert num_ahead > 3


def test_a_branch_that_is_cancelled_while_its_next_token_is_computed_gets_none(order: list[str]) -> None:
    """The pass that was begun before is used for the others, and no other one is computed in its place."""
    engine = tiny_engine(ISOLATED)
    sample = engine.submit(Sample(MAIN[:3], [[8], [9], [10]]), max_new_tokens=20, ignore_eos=True)
    for _ in range(3):
        engine.step()
    engine.cancel(sample, 1)
    held, num_runs = engine.stats().held_tokens, order.count("run")
    assert [(event.branch, event.finish_reason) for event in engine.step()] == [
        (1, "cancelled"),
        (0, None),
        (2, None),
    ]
    assert order.count("run") == num_runs + 1  # of the step after that
    assert engine.stats().held_tokens <= held
    events = step_interrupted(engine, lambda: engine.cancel(sample))
    assert {event.finish_reason for event in events} == {"cancelled"}
    assert not engine.stats().held_tokens
    assert run_to_end(engine) == []


def test_what_was_computed_ahead_is_dropped_with_a_sample_that_is_preempted(order: list[str]) -> None:
    """Blocks that are given to the running samples before they are known to need them do not run out."""
    limits = {"cache_tokens": 64}
    samples = [Sample([number] * 9, [[number + 1], [number + 2]]) for number in (5, 20)]
    expected = []
    for sample in samples:
        engine = tiny_engine(ISOLATED, **limits)
        engine.submit(sample, max_new_tokens=14, ignore_eos=True)
        expected += [event.token for event in run_to_end(engine)]
    engine = tiny_engine(ISOLATED, **limits)
    numbers = [engine.submit(sample, max_new_tokens=14, ignore_eos=True) for sample in samples]
    events = run_to_end(engine)
    assert engine.stats().preemptions or engine.stats().waiting_samples == 0
    assert [event.token for number in numbers for event in events if event.sample == number] == expected

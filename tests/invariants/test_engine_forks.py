"""Answers that fork by themselves: random forks, under preemption, cancels and adapters.

The tokens of an answer are those of the same tree made by calls of `fork` and `reduce` in an engine of its
own. The log-probabilities are those of training.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import COLUMNAR, ISOLATED, run_to_end, save_random_adapter
from forking import MARKERS, ScriptedEngine, forking_engine, forks_of, replay, tokens_by_index
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny import save_tiny, tiny_tokenizer

from parallelmind.config import DataConfig, ModelConfig, RopeConfig
from parallelmind.data.record_parser import parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.decoding_check import layout_logits
from parallelmind.engine.output import Event
from parallelmind.engine.request import Sample
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.evaluation.probes import check_close
from parallelmind.layout import arrange

EFFORT = settings(
    max_examples=8,
    stateful_step_count=16,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
KINDS = {"a fork", "a nested fork", "a second round", "a malformed fork", "preempted", "cancelled", "adapted"}
PIECES = ["a", "b c", "{one|two}", "{a|b|c}", "{x}", "{}", "{|a}", "{never", "</s>"]


def written(number: int, branch: int) -> str:
    """What a branch of a sample writes before its tokens are sampled."""
    rng = random.Random(repr((number, branch)))
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 3)))


class ForkMachine(RuleBasedStateMachine):
    """Samples fork by themselves in a cache that holds two or three of them."""

    def __init__(self, config: RopeConfig, adapter: Path, events: Counter[str]) -> None:
        super().__init__()
        self.config, self.adapter, self.events = config, adapter, events
        self.groups: dict[int, SequenceGroup] = {}
        self.got: dict[int, list[Event]] = {}
        self.asked: dict[int, dict[str, Any]] = {}
        self.cancelled: set[int] = set()

    @initialize()
    def begin(self) -> None:
        self.engine = self.new_engine(cache_tokens=24 * BLOCK, max_prefill_tokens=7, max_branches=20)
        self.alone = self.new_engine(cache_tokens=4096)

    def new_engine(self, **limits: int) -> ScriptedEngine:
        engine = forking_engine(self.config, written, **limits)
        engine.load_adapter("adapted", self.adapter)
        return engine

    @rule(new=st.integers(4, 160), depth=st.integers(0, 2), adapted=st.booleans(), then=st.integers(0, 4))
    def submit(self, new: int, depth: int, adapted: bool, then: int) -> None:
        number = self.engine.samples.num_submitted
        own = {"max_new_tokens": new, "seed": number, "temperature": 1.0, "max_fork_depth": depth}
        self.asked[number] = {**own, "adapter": "adapted" if adapted else None}
        self.engine.submit(self.sample(number), **self.asked[number])
        self.groups[number], self.got[number] = self.engine.samples.groups[number], []
        self.events["adapted"] += adapted
        self.step(then)

    def sample(self, number: int) -> Sample:
        return Sample("The passage is" * (number % 3), ["who" * (1 + number % 2)])

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), then=st.integers(0, 4))
    def cancel(self, data: st.DataObject, then: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.groups)))
        branch = data.draw(st.none() | st.integers(0, len(self.groups[number].branches) - 1))
        self.engine.cancel(number, branch)
        self.cancelled.add(number)
        self.events["cancelled"] += 1
        self.step(then)

    @rule(count=st.integers(1, 9))
    def step(self, count: int) -> None:
        for _ in range(count):
            for event in self.engine.step():
                self.got[event.sample].append(event)
        for number in [number for number in self.groups if self.engine.is_finished(number)]:
            self.check(number, self.groups.pop(number))

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            while self.engine.busy:
                self.step(1)

    def check(self, number: int, group: SequenceGroup) -> None:
        events, asked = self.got.pop(number), dict(self.asked[number])
        tokens, forks = tokens_by_index(events), forks_of(events)
        self.events["preempted"] += group.num_preemptions > 0
        self.events["a fork"] += bool(forks)
        self.events["a nested fork"] += any(
            group.branches[branch].parent for branch in forks if not group.branches[branch].is_reduce
        )
        self.events["a second round"] += any(group.branches[branch].is_reduce for branch in forks)
        self.events["a malformed fork"] += "{" in "".join(event.text for event in events)
        assert sum(map(len, tokens.values())) <= asked["max_new_tokens"]
        assert group.tree.depth - 1 <= asked["max_fork_depth"] + group.tree.reduces
        assert all(branch.is_finished for branch in group.branches)
        if number in self.cancelled:
            return
        alone = replay(self.alone, self.sample(number), asked, tokens, forks)
        assert tokens_by_index(alone) == tokens
        assert {(e.branch, e.pos2d) for e in alone if e.token} == {
            (e.branch, e.pos2d) for e in events if e.token
        }


@pytest.fixture(scope="module", params=[COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
def adapted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RopeConfig, Path]:
    """Rope settings, and an adapter that writes forks."""
    root, config = tmp_path_factory.mktemp("adapter"), request.param
    base = ModelConfig(base_model=save_tiny(root / "base"))
    # With other weights in every run, rounding decides a draw between two tokens in one run of twelve.
    save_random_adapter(root / "adapter", base, 0, config, fork_markers=MARKERS)
    return config, root / "adapter"


@pytest.mark.full
def test_the_tokens_are_those_of_explicit_forks(adapted: tuple[RopeConfig, Path]) -> None:
    config, folder = adapted
    events: Counter[str] = Counter()

    @seed(7)
    def machine() -> ForkMachine:
        return ForkMachine(config, folder, events)

    run_state_machine_as_test(machine, settings=EFFORT)
    assert set(+events) >= KINDS


ROUNDS = {
    "main": "The passage.",
    "branches": [
        {
            "prompt": "Who?",
            "completion": " see",
            "branches": [
                {"prompt": " one", "completion": " is"},
                {"prompt": " two", "completion": " are in"},
            ],
            "reduce": {
                "prompt": " so",
                "completion": " it is",
                "branches": [{"prompt": " x", "completion": " the"}],
            },
        }
    ],
}


@BOTH
def test_the_engine_computes_the_log_probabilities_of_training(config: RopeConfig) -> None:
    """The engine writes a record of two rounds, token by token."""
    (record,) = tokenise(
        [parse_value(ROUNDS)], tiny_tokenizer(), DataConfig(data_path="-", fork_markers=MARKERS)
    )
    assert record.tokens is not None
    cuts = np.cumsum(record.tokens.lengths)[:-1]
    ids, targets = np.split(record.tokens.ids, cuts), np.split(record.tokens.targets, cuts)
    answers = {
        index: own[chosen].tolist()
        for index, (own, chosen) in enumerate(zip(ids[1:], targets[1:], strict=True))
    }
    engine = forking_engine(config, {index: tiny_tokenizer().decode(own) for index, own in answers.items()})
    engine.submit(Sample("The passage.", ["Who?"]), max_new_tokens=400, logprobs=0)
    events = run_to_end(engine)
    assert tokens_by_index(events) == answers
    with torch.no_grad():
        trained = layout_logits(engine.model, arrange(record.tokens, config), config)[1:]
    for index, (logits, own, chosen) in enumerate(zip(trained, ids[1:], targets[1:], strict=True)):
        places = np.flatnonzero(chosen)
        expected = torch.log_softmax(logits, -1)[places - 1, own[places]]
        got = torch.tensor([event.logprob for event in events if event.branch == index])
        check_close(got, expected, f"segment {index}")

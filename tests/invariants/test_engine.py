"""Whatever comes and goes in an engine, each token is drawn from the logits of one full forward over its own
sample.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest
import torch
from families import variant
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig, Visibility
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.sampler import SampledToken, SamplingRow
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence import SequenceState
from parallelmind.errors import CapacityError
from parallelmind.evaluation.probes import check_close, patched
from parallelmind.evaluation.rope_configs import rope_config_grid
from parallelmind.evaluation.tiny_models import VOCABULARY, tiny_tokenizer
from parallelmind.layout import PADDING
from parallelmind.model.mask import attention_masks

END = 2
LONG = [3 + 7 * place % 120 for place in range(53)]
MAINS = [
    [],
    LONG[:9],
    LONG[:40],
    LONG[:32],
    LONG[:33] + LONG[:13],
]  # the last three begin with the same two blocks
MODELS = [
    (name, attention)
    for name in ("shared", "windows beside full attention")
    for attention in ("sdpa", "eager")  # the pool is read stretch by stretch, or through one dense mask
]
CONFIGS = rope_config_grid(
    visibility=("columnar", "isolated"), positions=("time", "flat"), align_to=("left", "right")
)
EFFORT = settings(
    max_examples=10,
    stateful_step_count=24,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failing example is readable as it is, and takes minutes to shrink
    suppress_health_check=list(HealthCheck),
)
MOST_BRANCHES = 7
LENGTH, MOST, STEPS = st.integers(1, 18), st.integers(1, 12), st.integers(0, 3)
MAIN, SHAPE = (
    st.sampled_from(MAINS),
    st.lists(st.tuples(LENGTH, MOST), min_size=1, max_size=4),
)  # prompt and new tokens


class Recording(Engine):
    """Keeps the logits of every draw, by the seed that says whose it is, and draws without regard to them.

    Tokens chosen by the logits of a tiny model soon repeat, and equal tokens hide a mistaken place.
    """

    def __init__(self, model: PreTrainedModel, limits: EngineConfig) -> None:
        super().__init__(model, tiny_tokenizer(), limits)
        self.seen: dict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        for row, found in zip(rows, logits, strict=True):
            self.seen[row.seed, row.branch].append(found)
        return [SampledToken(token_of(row.seed, row.branch, row.index), None) for row in rows]


def token_of(*place: int) -> int:
    """Any token, one in twenty the end of a text."""
    draw = random.Random(repr(place))
    return END if draw.random() < 0.05 else draw.randrange(END + 1, VOCABULARY)


def prompt(length: int, *place: int) -> list[int]:
    return [random.Random(repr((place, index))).randrange(END + 1, VOCABULARY) for index in range(length)]


@torch.no_grad()
def whole_logits(model: PreTrainedModel, state: SequenceState) -> list[Tensor]:
    """`[length, vocab]` of main and each branch, from one uncached forward; who reads all of a sample does so
    by columns.
    """
    layout = state.final_layout()
    ids, sequence, branch, time, position = (
        torch.from_numpy(part)[None]
        for part in (layout.ids, layout.sequence, layout.branch, layout.time, layout.position)
    )
    wide = torch.from_numpy(np.append(False, state.reads_all))[sequence[0]][:, None]

    def mask(rule: Visibility) -> dict[Any, Tensor]:
        found = attention_masks(model, time, sequence, rule)
        return found if isinstance(found, dict) else {None: found}

    columns = mask("columnar")
    masks = {
        kind: torch.where(wide, columns[kind], own) for kind, own in mask(state.config.visibility).items()
    }
    logits = model(
        input_ids=ids,
        attention_mask=masks.get(None, masks),
        position_ids=position,
        pos2d=torch.stack([branch, time], dim=-1),
        use_cache=False,
    ).logits[0]
    return [logits[sequence[0] == number] for number in range(len(state.lengths) + 1)]


class ComingAndGoing(RuleBasedStateMachine):
    """Samples come, grow, lose branches and leave, in a pool that holds two or three of them."""

    def __init__(self, models: list[PreTrainedModel], happened: Counter[str]) -> None:
        super().__init__()
        self.models, self.happened = models, happened
        self.states: dict[int, SequenceState] = {}  # of samples that go on

    @initialize(
        number=st.integers(0, len(MODELS) - 1), main=MAIN, shape=SHAPE, last=st.none() | LENGTH, then=STEPS
    )
    def begin(self, number: int, **sample: Any) -> None:
        self.model = self.models[number]
        self.engine = Recording(
            self.model,
            EngineConfig(cache_tokens=20 * BLOCK, max_prefill_tokens=7, max_branches=MOST_BRANCHES),
        )
        self.submit(**sample)

    @rule(main=MAIN, shape=SHAPE, last=st.none() | LENGTH, then=STEPS)
    def submit(self, main: list[int], shape: list[tuple[int, int]], last: int | None, then: int) -> None:
        number = self.engine.scheduler._count
        prompts = [prompt(length, number, branch) for branch, (length, _) in enumerate(shape)]
        most = [{"max_new_tokens": count} for _, count in shape]
        reduce = prompt(last, number, PADDING) if last else None
        found = self.engine.submit(
            Sample(main, prompts), per_branch=most, reduce=reduce, max_new_tokens=4, seed=number
        )
        assert found == number
        self.states[number] = self.engine._samples[number].entry.decoding
        self.step(then)

    @precondition(lambda self: self.open())
    @rule(data=st.data(), length=LENGTH, most=MOST, then=STEPS)
    def join(self, data: st.DataObject, length: int, most: int, then: int) -> None:
        number = data.draw(st.sampled_from(self.open()))
        state = self.states[number]
        with suppress(CapacityError):
            self.engine.join(
                number, prompt(length, number, len(state.lengths)), max_new_tokens=most, seed=number
            )
            self.happened["joined late"] += bool(state.fed.any())
        self.step(then)

    @precondition(lambda self: self.states)
    @rule(data=st.data(), then=STEPS)
    def cancel_a_branch(self, data: st.DataObject, then: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.states)))
        self.engine.cancel(
            number, data.draw(st.sampled_from(np.flatnonzero(self.states[number].live).tolist()))
        )
        self.step(then)

    @precondition(lambda self: len(self.states) > 1)
    @rule(data=st.data(), then=STEPS)
    def cancel_a_sample(self, data: st.DataObject, then: int) -> None:
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.states))))
        self.step(then)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            waiting, running = self.engine.scheduler.waiting, self.engine.scheduler.running
            self.happened["waited for room"] += bool(waiting and running)
            self.happened["stopped within a prompt"] += any(entry.decoding.waiting for entry in running)
            self.happened["read by all"] += any(entry.decoding.reads_all.any() for entry in running)
            self.what_has_ended_was_one_forward()
            self.every_block_has_one_holder()

    def open(self) -> list[int]:
        """Samples that can be joined: nobody may come before one who reads them all."""
        fits = {
            number: state for number, state in self.states.items() if len(state.lengths) < MOST_BRANCHES - 1
        }
        return [number for number, state in fits.items() if not state.reads_all.any()]

    @invariant()
    def what_has_ended_was_one_forward(self) -> None:
        for number in [number for number, state in self.states.items() if state.done]:
            state = self.states.pop(number)
            whole = whole_logits(self.model, state)[1:]
            for branch, start in enumerate((state.prompt_lengths - 1).tolist()):
                seen = self.engine.seen[number, branch]
                assert len(seen) == len(state.generated(branch))
                if seen:
                    expected = whole[branch][start : start + len(seen)]
                    check_close(
                        torch.stack(seen),
                        expected,
                        f"sample {number}, branch {branch}: cached and full logits",
                    )

    @invariant()
    def every_block_has_one_holder(self) -> None:
        """Beside those of a main that have been computed, which may have several."""
        running = self.engine.scheduler.running
        own = [block for entry in running for block in entry.stored().trunk.blocks[entry.shared :]]
        own += [
            block for entry in running for stream in entry.stored().branches or [] for block in stream.blocks
        ]
        own += [block for entry in running if entry.reduction for block in entry.reserved]
        shared = {block for entry in running for block in entry.stored().trunk.blocks[: entry.shared]}
        assert len(set(own)) == len(own)
        assert shared.isdisjoint(own)
        assert len(own) + len(shared) == self.engine.scheduler.blocks.held

    def teardown(self) -> None:
        while self.engine.busy:
            self.step(1)
        scheduler = self.engine.scheduler
        assert not self.states
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.blocks.available == scheduler.blocks.count
        self.happened["reused a main"] += bool(scheduler.reused_tokens)


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda part: f"{part.visibility}-{part.positions}-{part.align_to}"
)
def test_samples_that_come_and_go_are_each_one_full_forward(config: RopeConfig) -> None:
    happened: Counter[str] = Counter()
    models = [variant(*each) for each in MODELS]

    @seed(CONFIGS.index(config))
    def machine() -> ComingAndGoing:
        return ComingAndGoing(models, happened)

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(patched(model, config))
        run_state_machine_as_test(machine, settings=EFFORT)
    kinds = {"joined late", "waited for room", "stopped within a prompt", "read by all", "reused a main"}
    assert set(+happened) == kinds

"""What a sample says does not depend on who else is there, what the cache holds already, or how far others
are.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread

import pytest
import torch
from engines import COLUMNAR, ISOLATED, answers, run, said, step_interrupted, tiny_engine
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.decoding_check import layout_logits
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.sampler import SampledToken
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models as tiny

MAIN = list(range(50, 90))
SAMPLE = Sample(MAIN, [[5, 6, 7], [8], list(range(100, 120))])
BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
SETTINGS = {"greedy": {}, "seeded": {"temperature": 1.0, "top_p": 0.95, "seed": 4}}


@BOTH
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_a_sample_says_the_same_alone_and_in_company(config: RopeConfig, sampling: dict) -> None:
    settings = {**sampling, "max_new_tokens": 8, "ignore_eos": True}
    alone = answers(tiny_engine(config), SAMPLE, **settings)
    engine, chance = tiny_engine(config, max_prefill_tokens=24), random.Random(0)
    own = engine.submit(SAMPLE, **settings)
    events = []
    for other in range(10):
        main, prompts = (
            MAIN[: chance.choice([0, 9, 32, 40])],
            [[other + 3] * chance.randint(1, 20)] * chance.randint(1, 3),
        )
        engine.submit(
            Sample(main, prompts), max_new_tokens=chance.randint(1, 12), temperature=chance.choice([0.0, 2.0])
        )
        for _ in range(chance.randint(0, 2)):
            events += engine.step()
    tokens = said(events + run(engine))
    assert [tokens[own, branch] for branch in range(3)] == alone
    assert engine.scheduler.num_reused_tokens


@BOTH
def test_a_main_in_the_cache_is_not_read_again(config: RopeConfig) -> None:
    engine = tiny_engine(config)
    first = answers(engine, SAMPLE, max_new_tokens=6)
    assert (engine.scheduler.num_main_tokens, engine.scheduler.num_reused_tokens) == (40, 0)
    assert answers(engine, SAMPLE, max_new_tokens=6) == first
    assert (engine.scheduler.num_main_tokens, engine.scheduler.num_reused_tokens) == (80, 32)
    other = answers(engine, Sample(MAIN[:20], [[5]]), max_new_tokens=6)
    assert engine.scheduler.num_reused_tokens == 48
    assert other == answers(tiny_engine(config), Sample(MAIN[:20], [[5]]), max_new_tokens=6)


def row_engine() -> Engine:
    return Engine(
        tiny.tiny_model("mamba2"),
        tiny.tiny_tokenizer(),
        EngineConfig(cache_tokens=512, max_prefill_tokens=16),
    )


def test_a_model_with_a_memory_of_its_own_reads_every_main() -> None:
    engine = row_engine()
    first = answers(engine, SAMPLE, max_new_tokens=4, ignore_eos=True)
    assert answers(engine, SAMPLE, max_new_tokens=4, ignore_eos=True) == first


@BOTH
def test_a_long_prompt_stalls_nobody(config: RopeConfig) -> None:
    alone = answers(tiny_engine(config), Sample(MAIN, [[5]]), max_new_tokens=4, ignore_eos=True)
    engine = tiny_engine(config, max_prefill_tokens=8)
    talking = engine.submit(Sample([], [[3], [4]]), max_new_tokens=40, ignore_eos=True)
    engine.step()
    late = engine.submit(Sample(MAIN, [[5]]), max_new_tokens=4, ignore_eos=True)
    steps = []
    while not (steps and any(event.sample == late for event in steps[-1])):
        steps.append(engine.step())
    assert len(steps) == 6, "41 prompt tokens, 8 at a time"
    for events in steps:
        assert [event.branch for event in events if event.sample == talking] == [0, 1]
    assert said(steps[-1] + run(engine))[late, 0] == alone[0]


class Parrot(Engine):
    """Every branch of its samples says one text."""

    TEXT = "né 你好 👍🏽 end"

    def sample(self, logits, rows):
        ids = tiny_tokenizer()(self.TEXT).input_ids
        return [SampledToken(ids[row.index], None) for row in rows]


def test_streamed_text_adds_up_where_tokens_split_characters() -> None:
    engine, texts = tiny_engine(kind=Parrot), {}
    length = len(tiny_tokenizer()(Parrot.TEXT).input_ids)
    assert length > len(Parrot.TEXT)
    engine.submit(Sample("who", ["is", "a"]), max_new_tokens=length)
    events = engine.step()
    engine.submit(Sample("who", ["is", "a"]), max_new_tokens=length)
    for event in events + run(engine):
        texts[event.sample, event.branch] = texts.get((event.sample, event.branch), "") + event.text
        assert "\ufffd" not in event.text
    assert texts == dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], Parrot.TEXT)


def test_each_branch_ends_for_its_own_reason() -> None:
    (whole,) = (
        tiny_tokenizer().decode(tokens)
        for tokens in answers(tiny_engine(), Sample("", [[5]]), max_new_tokens=6)
    )
    engine, stop = tiny_engine(), whole[2]
    own = [{"stop": [stop]}, {"max_new_tokens": 3}, {"logit_bias": {2: 100}}, {"max_new_tokens": 50}]
    number = engine.submit(Sample("", [[5]] * 4), per_branch=own, max_new_tokens=6)
    events = [event for _ in range(8) for event in engine.step()]
    engine.cancel(number, 3)
    events += run(engine)
    reasons = {event.branch: event.finish_reason for event in events if event.finish_reason}
    assert reasons == {0: "stop", 1: "length", 2: "stop", 3: "cancelled"}
    assert "".join(event.text for event in events if event.branch == 0) == whole[: whole.index(stop)]
    tokens = said(events)
    assert [len(tokens[number, branch]) for branch in (1, 2, 3)] == [3, 1, 8]


@BOTH
def test_logprobs_are_those_of_one_full_forward(config: RopeConfig) -> None:
    engine = tiny_engine(config, max_prefill_tokens=10)
    number = engine.submit(SAMPLE, max_new_tokens=6, logprobs=3, temperature=1.0, seed=1, ignore_eos=True)
    group = engine._groups[number]
    events = run(engine)
    whole = layout_logits(engine.model, group.final_layout(), config)[1:]
    for branch, logits in enumerate(whole):
        expected = logits[group.branches[branch].num_prompt - 1 : -1].log_softmax(dim=-1)
        own = [event for event in events if event.branch == branch]
        chosen = expected[range(6), [event.token for event in own]]
        torch.testing.assert_close(
            torch.tensor([event.logprob for event in own]), chosen, atol=1e-4, rtol=1e-4
        )
        best = expected.topk(3)
        assert [[token for token, _ in event.top] for event in own] == best.indices.tolist()


@BOTH
def test_a_reducing_branch_follows_and_reads_all(config: RopeConfig) -> None:
    def events(changed: int) -> list:
        engine = tiny_engine(config)
        engine.submit(
            Sample(MAIN, [[5, 6, changed], [8]]),
            reduce=[9, 10],
            max_new_tokens=4,
            ignore_eos=True,
            logprobs=0,
        )
        return run(engine)

    before, after = events(7), events(30)
    order = [event.branch for event in before]
    assert order.index(2) > max(at for at, branch in enumerate(order) if branch < 2)
    assert [order.count(branch) for branch in range(3)] == [4, 4, 4]
    one, other = ([event.logprob for event in found if event.branch == 2] for found in (before, after))
    assert abs(one[0] - other[0]) > 1e-2
    if config is ISOLATED:
        assert [event for event in before if event.branch == 1] == [
            event for event in after if event.branch == 1
        ]


def test_an_isolated_branch_that_joins_late_says_what_it_would_have_said() -> None:
    settings = {"max_new_tokens": 6, "ignore_eos": True}
    expected = answers(tiny_engine(), SAMPLE, **settings)
    engine = tiny_engine()
    number = engine.submit(Sample(MAIN, SAMPLE.branches[:2]), **settings)
    events = [event for _ in range(4) for event in engine.step()]
    assert engine.join(number, SAMPLE.branches[2], **settings) == 2
    tokens = said(events + run(engine))
    assert [tokens[number, branch] for branch in range(3)] == expected


@pytest.mark.parametrize(
    "make", [tiny_engine, partial(tiny_engine, COLUMNAR), row_engine], ids=["free", "columns", "rows"]
)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_cancelled_during_a_step_says_nothing_more(make: Callable[[], Engine], steps: int) -> None:
    engine, settings = make(), {"max_new_tokens": 6, "ignore_eos": True}
    number, dropped = (engine.submit(SAMPLE, **settings) for _ in range(2))
    events = [event for _ in range(steps) for event in engine.step()]
    before = {key: list(tokens) for key, tokens in said(events).items()}
    events += step_interrupted(engine, lambda: (engine.cancel(number, 1), engine.cancel(dropped)))
    tokens = said(events + run(engine))
    assert [len(tokens[number, branch]) for branch in (0, 2)] == [6, 6]
    for key in ((number, 1), *((dropped, branch) for branch in range(3))):
        assert tokens[key] == before.get(key, [])
    assert engine.scheduler.block_manager.num_allocated == 0
    assert not getattr(engine.runner, "_states", None)


@BOTH
def test_a_branch_may_join_during_a_step(config: RopeConfig) -> None:
    engine, settings = tiny_engine(config), {"max_new_tokens": 4, "ignore_eos": True}
    number = engine.submit(Sample(MAIN, [[5]]), **settings)
    events = engine.step()
    events += step_interrupted(engine, lambda: engine.join(number, [6, 7], **settings))
    assert {key: len(tokens) for key, tokens in said(events + run(engine)).items()} == {
        (number, 0): 4,
        (number, 1): 4,
    }


def test_threads_may_submit_join_and_cancel_while_another_steps() -> None:
    settings = {"max_new_tokens": 24, "ignore_eos": True}
    expected = answers(tiny_engine(), SAMPLE, **settings)
    engine = tiny_engine(cache_tokens=1024, max_prefill_tokens=16)
    own = engine.submit(SAMPLE, **settings)
    begun = {(own, branch) for branch in range(3)}

    def disturb() -> None:
        victims = []
        for turn in range(12):
            victims.append(engine.submit(Sample(MAIN[:20], [[3, 4], [turn + 5]]), max_new_tokens=24))
            begun.update({(victims[-1], 0), (victims[-1], 1)})
            with suppress(UserError):  # it may have ended
                begun.add((victims[turn // 2], engine.join(victims[turn // 2], [9], max_new_tokens=5)))
            engine.cancel(victims[turn // 2], turn % 2)
            engine.cancel(victims[turn // 3])

    thread, events = Thread(target=disturb), []
    thread.start()
    while thread.is_alive() or engine.busy:
        events += engine.step()
    tokens = said(events)
    assert [tokens[own, branch] for branch in range(3)] == expected
    ends = Counter((event.sample, event.branch) for event in events if event.finish_reason)
    assert ends == dict.fromkeys(begun, 1)
    assert engine.scheduler.block_manager.num_allocated == 0

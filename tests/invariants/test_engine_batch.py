"""The tokens of a sample do not depend on other samples, on what the cache holds, or on their progress."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread

import pytest
import torch
from engines import COLUMNAR, ISOLATED, decode, run_to_end, step_interrupted, tiny_engine, tokens_by_branch
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.decoding_check import layout_logits
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.sampler import PendingTokens
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models as tiny

MAIN = list(range(50, 90))
SAMPLE = Sample(MAIN, [[5, 6, 7], [8], list(range(100, 120))])
BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
SETTINGS = {"greedy": {}, "seeded": {"temperature": 1.0, "top_p": 0.95, "seed": 4}}


@BOTH
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_a_sample_gets_the_same_tokens_alone_and_in_a_batch(config: RopeConfig, sampling: dict) -> None:
    settings = {**sampling, "max_new_tokens": 8, "ignore_eos": True}
    alone = decode(tiny_engine(config), SAMPLE, **settings)
    engine, rng = tiny_engine(config, max_prefill_tokens=24), random.Random(0)
    own = engine.submit(SAMPLE, **settings)
    events = []
    for other in range(10):
        main, prompts = (
            MAIN[: rng.choice([0, 9, 32, 40])],
            [[other + 3] * rng.randint(1, 20)] * rng.randint(1, 3),
        )
        engine.submit(
            Sample(main, prompts), max_new_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 2.0])
        )
        for _ in range(rng.randint(0, 2)):
            events += engine.step()
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert [tokens[own, branch] for branch in range(3)] == alone
    assert engine.scheduler.num_reused_tokens


@BOTH
def test_a_cached_main_is_not_computed_again(config: RopeConfig) -> None:
    engine, free = tiny_engine(config), config is ISOLATED
    first = decode(engine, SAMPLE, max_new_tokens=6)
    assert engine.scheduler.num_reused_tokens == 0
    assert decode(engine, SAMPLE, max_new_tokens=6) == first
    assert engine.scheduler.num_reused_tokens == (40 + 16 if free else 32), "prompts in free order only"
    reused = engine.scheduler.num_reused_tokens
    other = decode(engine, Sample(MAIN[:20], [[5]]), max_new_tokens=6)
    assert engine.scheduler.num_reused_tokens == reused + 16
    assert other == decode(tiny_engine(config), Sample(MAIN[:20], [[5]]), max_new_tokens=6)


def sequential_engine() -> Engine:
    return Engine(
        tiny.tiny_model("mamba2"),
        tiny.tiny_tokenizer(),
        EngineConfig(cache_tokens=512, max_prefill_tokens=16),
    )


def test_a_recurrent_model_computes_every_main() -> None:
    engine = sequential_engine()
    first = decode(engine, SAMPLE, max_new_tokens=4, ignore_eos=True)
    assert decode(engine, SAMPLE, max_new_tokens=4, ignore_eos=True) == first


@BOTH
def test_a_long_prompt_does_not_delay_other_samples(config: RopeConfig) -> None:
    alone = decode(tiny_engine(config), Sample(MAIN, [[5]]), max_new_tokens=4, ignore_eos=True)
    engine = tiny_engine(config, max_prefill_tokens=16, prefill_share=0.5)
    talking = engine.submit(Sample([], [[3], [4]]), max_new_tokens=40, ignore_eos=True)
    engine.step()
    late = engine.submit(Sample(MAIN, [[5]]), max_new_tokens=4, ignore_eos=True)
    steps = []
    while not (steps and any(event.sample == late for event in steps[-1])):
        steps.append(engine.step())
    assert len(steps) == 6, "41 prompt tokens, 8 in each step"
    for events in steps:
        assert [event.branch for event in events if event.sample == talking] == [0, 1]
    assert tokens_by_branch(steps[-1] + run_to_end(engine))[late, 0] == alone[0]


class FixedTextEngine(Engine):
    """Every branch decodes the same text."""

    TEXT = "né 你好 👍🏽 end"

    def sample(self, logits, rows, masks=None):
        ids = tiny_tokenizer()(self.TEXT).input_ids
        return PendingTokens.of([ids[row.index] for row in rows])


def test_streamed_text_adds_up_if_tokens_split_characters() -> None:
    engine, texts = tiny_engine(kind=FixedTextEngine), {}
    length = len(tiny_tokenizer()(FixedTextEngine.TEXT).input_ids)
    assert length > len(FixedTextEngine.TEXT)
    engine.submit(Sample("who", ["is", "a"]), max_new_tokens=length)
    events = engine.step()
    engine.submit(Sample("who", ["is", "a"]), max_new_tokens=length)
    for event in events + run_to_end(engine):
        texts[event.sample, event.branch] = texts.get((event.sample, event.branch), "") + event.text
        assert "\ufffd" not in event.text
    assert texts == dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], FixedTextEngine.TEXT)


def test_each_branch_has_its_own_finish_reason() -> None:
    (whole,) = (
        tiny_tokenizer().decode(tokens)
        for tokens in decode(tiny_engine(), Sample("", [[5]]), max_new_tokens=6)
    )
    engine, stop = tiny_engine(), whole[2]
    own = [{"stop": [stop]}, {"max_new_tokens": 3}, {"logit_bias": {2: 100}}, {"max_new_tokens": 50}]
    sample_id = engine.submit(Sample("", [[5]] * 4), per_branch=own, max_new_tokens=6)
    events = [event for _ in range(8) for event in engine.step()]
    engine.cancel(sample_id, 3)
    events += run_to_end(engine)
    reasons = {event.branch: event.finish_reason for event in events if event.finish_reason}
    assert reasons == {0: "stop", 1: "length", 2: "stop", 3: "cancelled"}
    assert "".join(event.text for event in events if event.branch == 0) == whole[: whole.index(stop)]
    tokens = tokens_by_branch(events)
    assert [len(tokens[sample_id, branch]) for branch in (1, 2, 3)] == [3, 1, 8]


@BOTH
def test_logprobs_are_those_of_one_full_forward(config: RopeConfig) -> None:
    engine = tiny_engine(config, max_prefill_tokens=10)
    sample_id = engine.submit(SAMPLE, max_new_tokens=6, logprobs=3, temperature=1.0, seed=1, ignore_eos=True)
    group = engine.samples.groups[sample_id]
    events = run_to_end(engine)
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
def test_the_reduce_branch_starts_last_and_reads_all_branches(config: RopeConfig) -> None:
    def events(changed: int) -> list:
        engine = tiny_engine(config)
        engine.submit(
            Sample(MAIN, [[5, 6, changed], [8]]),
            reduce=[9, 10],
            max_new_tokens=4,
            ignore_eos=True,
            logprobs=0,
        )
        return run_to_end(engine)

    before, after = events(7), events(30)
    order = [event.branch for event in before]
    assert order.index(2) > max(at for at, branch in enumerate(order) if branch < 2)
    assert [order.count(branch) for branch in range(3)] == [4, 4, 4]
    one, other = ([event.logprob for event in decoded if event.branch == 2] for decoded in (before, after))
    assert abs(one[0] - other[0]) > 1e-2
    if config is ISOLATED:
        assert [event for event in before if event.branch == 1] == [
            event for event in after if event.branch == 1
        ]


def test_an_isolated_branch_that_joins_late_gets_the_same_tokens() -> None:
    settings = {"max_new_tokens": 6, "ignore_eos": True}
    expected = decode(tiny_engine(), SAMPLE, **settings)
    engine = tiny_engine()
    sample_id = engine.submit(Sample(MAIN, SAMPLE.branches[:2]), **settings)
    events = [event for _ in range(4) for event in engine.step()]
    assert engine.join(sample_id, SAMPLE.branches[2], **settings) == 2
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert [tokens[sample_id, branch] for branch in range(3)] == expected


@pytest.mark.parametrize(
    "make",
    [tiny_engine, partial(tiny_engine, COLUMNAR), sequential_engine],
    ids=["free", "columns", "sequential"],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_branch_cancelled_during_a_step_gets_no_more_tokens(make: Callable[[], Engine], steps: int) -> None:
    engine, settings = make(), {"max_new_tokens": 6, "ignore_eos": True}
    sample_id, dropped = (engine.submit(SAMPLE, **settings) for _ in range(2))
    events = [event for _ in range(steps) for event in engine.step()]
    before = {key: list(tokens) for key, tokens in tokens_by_branch(events).items()}
    events += step_interrupted(engine, lambda: (engine.cancel(sample_id, 1), engine.cancel(dropped)))
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert [len(tokens[sample_id, branch]) for branch in (0, 2)] == [6, 6]
    for key in ((sample_id, 1), *((dropped, branch) for branch in range(3))):
        assert tokens[key] == before.get(key, [])
    assert engine.scheduler.block_manager.num_allocated == 0
    assert not getattr(engine.runner, "_states", None)


@BOTH
def test_a_branch_can_join_during_a_step(config: RopeConfig) -> None:
    engine, settings = tiny_engine(config), {"max_new_tokens": 4, "ignore_eos": True}
    sample_id = engine.submit(Sample(MAIN, [[5]]), **settings)
    events = engine.step()
    events += step_interrupted(engine, lambda: engine.join(sample_id, [6, 7], **settings))
    assert {key: len(tokens) for key, tokens in tokens_by_branch(events + run_to_end(engine)).items()} == {
        (sample_id, 0): 4,
        (sample_id, 1): 4,
    }


def test_threads_can_submit_join_and_cancel_during_steps() -> None:
    settings = {"max_new_tokens": 24, "ignore_eos": True}
    expected = decode(tiny_engine(), SAMPLE, **settings)
    engine = tiny_engine(cache_tokens=1024, max_prefill_tokens=16)
    own = engine.submit(SAMPLE, **settings)
    expected_ends = {(own, branch) for branch in range(3)}

    def interfere() -> None:
        victims = []
        for turn in range(12):
            victims.append(engine.submit(Sample(MAIN[:20], [[3, 4], [turn + 5]]), max_new_tokens=24))
            expected_ends.update({(victims[-1], 0), (victims[-1], 1)})
            with suppress(UserError):  # it may have ended
                expected_ends.add(
                    (victims[turn // 2], engine.join(victims[turn // 2], [9], max_new_tokens=5))
                )
            engine.cancel(victims[turn // 2], turn % 2)
            engine.cancel(victims[turn // 3])

    thread, events = Thread(target=interfere), []
    thread.start()
    while thread.is_alive() or engine.busy:
        events += engine.step()
    tokens = tokens_by_branch(events)
    assert [tokens[own, branch] for branch in range(3)] == expected
    ends = Counter((event.sample, event.branch) for event in events if event.finish_reason)
    assert ends == dict.fromkeys(expected_ends, 1)
    assert engine.scheduler.block_manager.num_allocated == 0

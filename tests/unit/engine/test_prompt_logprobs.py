"""Log-probabilities of prompt tokens are those of one full forward pass, whatever the cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import COLUMNAR, ISOLATED, decode, run_to_end, tiny_engine
from recording import full_forward_logits
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event, TokenLogprob
from parallelmind.engine.request import ResumeState, Sample, Segment
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models as tiny
from parallelmind.model.patch import patch

MAIN = list(range(50, 90))
PROMPTS = [[5, 6, 7], [8], list(range(100, 140))]
BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
ROUNDING = 1e-4
ASKING = {"max_new_tokens": 1, "prompt_logprobs": 2, "ignore_eos": True}


def prompts_of(events: list[Event]) -> dict[tuple[int, int], tuple[TokenLogprob, ...]]:
    """The scored prompt of every (sample, branch)."""
    return {(event.sample, event.branch): event.prompt for event in events if event.prompt}


def expected(engine: Engine, group: SequenceGroup) -> list[list[float | None]]:
    """Log-probabilities of the prompts of a sample that has ended, from one full forward pass."""
    main, *branches = (logits.float().log_softmax(-1) for logits in full_forward_logits(engine.model, group))
    return [
        [float(main[-1][branch.prompt[0]]) if len(main) else None]
        + [float(row[token]) for row, token in zip(logits, branch.prompt[1:], strict=False)]
        for branch, logits in zip(group.branches, branches, strict=True)
    ]


def check(engine: Engine, sample: Sample, **settings: Any) -> None:
    """Decode a sample alone and compare."""
    number = engine.submit(sample, **{**ASKING, **settings})
    group = engine.samples.groups[number]
    found = prompts_of(run_to_end(engine))
    wanted = expected(engine, group)
    assert sorted(found) == [(number, branch) for branch in range(len(wanted))]
    for branch, values in enumerate(wanted):
        scored = found[number, branch]
        assert [token.token for token in scored] == list(sample.branches[branch])  # type: ignore[call-overload]
        assert [token.logprob for token in scored] == pytest.approx(values, abs=ROUNDING)
        for token in scored:
            assert [len(token.top), token.top == ()] == ([0, True] if token.logprob is None else [2, False])
            assert all(token.logprob is None or token.logprob <= value + 1e-6 for _, value in token.top[:1])


@BOTH
@pytest.mark.parametrize("main", [[], MAIN], ids=["alone", "after main"])
@pytest.mark.parametrize("max_prefill_tokens", [7, 512])
def test_they_are_those_of_one_forward_pass(
    config: RopeConfig, main: list[int], max_prefill_tokens: int
) -> None:
    check(tiny_engine(config, max_prefill_tokens=max_prefill_tokens), Sample(main, PROMPTS))


@BOTH
@pytest.mark.parametrize("main", [[], MAIN, MAIN[:32]], ids=["alone", "after main", "after whole blocks"])
def test_cached_blocks_do_not_drop_them(config: RopeConfig, main: list[int]) -> None:
    engine = tiny_engine(config)
    for _ in range(2):
        decode(engine, Sample(main, PROMPTS), max_new_tokens=20, ignore_eos=True)
    check(engine, Sample(main, PROMPTS))
    check(engine, Sample(main, PROMPTS))
    if main:
        assert engine.scheduler.num_reused_tokens > 2 * (len(main) - 16)  # main is not computed for each


@BOTH
def test_samples_that_begin_alike_at_once_have_their_own(config: RopeConfig) -> None:
    engine = tiny_engine(config, max_prefill_tokens=24)
    plain = engine.submit(Sample(MAIN, PROMPTS), max_new_tokens=3)
    numbers = [engine.submit(Sample(MAIN, PROMPTS), **ASKING) for _ in range(3)]
    group = engine.samples.groups[numbers[0]]
    found = prompts_of(run_to_end(engine))
    wanted = expected(engine, group)
    assert {number for number, _ in found} == {*numbers} - {plain}
    for (_, branch), scored in found.items():
        assert [token.logprob for token in scored] == pytest.approx(wanted[branch], abs=ROUNDING)


@BOTH
def test_a_sample_that_is_preempted_amid_its_prompts_has_them(config: RopeConfig) -> None:
    engine = tiny_engine(config, max_prefill_tokens=24)
    number = engine.submit(Sample(MAIN, PROMPTS), **{**ASKING, "max_new_tokens": 4})
    group = engine.samples.groups[number]
    events = [event for _ in range(3) for event in engine.step()]
    assert not any(event.branch == 2 for event in events)
    engine.scheduler._preempt(group)
    found = prompts_of(events + run_to_end(engine))
    for branch, values in enumerate(expected(engine, group)):
        assert [token.logprob for token in found[number, branch]] == pytest.approx(values, abs=ROUNDING)


@pytest.mark.parametrize("build", ["mamba2", "eager"])
def test_other_ways_to_compute_give_the_same(build: str) -> None:
    if build == "eager":
        model = tiny_llama(attn_implementation="eager")
        patch(model, ISOLATED)
        check(Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=1024)), Sample(MAIN, PROMPTS))
        return
    engine = Engine(tiny.tiny_model("mamba2"), tiny.tiny_tokenizer(), EngineConfig(cache_tokens=1024))
    sample = Sample([50, 51, 52], [[5, 6, 7], [8]])
    number = engine.submit(sample, **ASKING)
    found = prompts_of(run_to_end(engine))
    for branch, prompt in enumerate(sample.branches):
        ids = torch.tensor([[*sample.main, *prompt]])
        with torch.no_grad():
            logprobs = engine.model(input_ids=ids).logits[0].float().log_softmax(-1)
        values = [float(logprobs[2 + index, token]) for index, token in enumerate(prompt)]
        scored = found[number, branch]
        assert [token.logprob for token in scored] == pytest.approx(values, abs=ROUNDING)


def test_branches_that_do_not_ask_cost_nothing_and_the_answer_is_the_same() -> None:
    engine = tiny_engine(ISOLATED)
    own = [{"prompt_logprobs": 0}, {}, {}]
    number = engine.submit(Sample(MAIN, PROMPTS), per_branch=own, max_new_tokens=6, ignore_eos=True)
    plan = engine.scheduler.schedule()
    assert len(plan.forward.scheduled[0].tokens.labels.branches) == len(PROMPTS[0])
    events = run_to_end(engine)
    assert list(prompts_of(events)) == [(number, 0)]
    assert sum(bool(event.prompt) for event in events) == 1
    tokens = [[e.token for e in events if e.branch == branch] for branch in range(3)]
    assert tokens == decode(tiny_engine(ISOLATED), Sample(MAIN, PROMPTS), max_new_tokens=6, ignore_eos=True)


def test_a_branch_of_a_branch_is_scored_after_what_its_parent_decoded() -> None:
    engine = tiny_engine(ISOLATED)
    leaf = Segment([5, 6, 7], sampling={"prompt_logprobs": 0, "max_new_tokens": 1})
    number = engine.submit(
        Sample(MAIN, [Segment([8, 9], branches=[leaf])]), max_new_tokens=4, ignore_eos=True
    )
    group = engine.samples.groups[number]
    found = prompts_of(run_to_end(engine))[number, 1]
    parent, child = (logits.log_softmax(-1) for logits in full_forward_logits(engine.model, group)[1:])
    values = [float(parent[-1][5]), float(child[0][6]), float(child[1][7])]
    assert [token.logprob for token in found] == pytest.approx(values, abs=ROUNDING)


def test_a_resumed_branch_has_them_unless_it_has_told_them() -> None:
    request = tokenize_request(
        tiny_tokenizer(), Sample([], [[5, 6, 7]]), None, None, {**ASKING, "max_new_tokens": 4}
    )
    for tokens in ([], [9]):
        engine = tiny_engine(ISOLATED)
        engine.enqueue(request, resume=ResumeState([0], [tokens], [None]))
        assert bool(prompts_of(run_to_end(engine))) is not bool(tokens)


def test_a_branch_that_decodes_nothing_cannot_have_them() -> None:
    with pytest.raises(UserError, match="max_new_tokens=0: prompt_logprobs needs"):
        tiny_engine().submit(Sample([], [[5], [6]]), prompt_logprobs=0, max_new_tokens=0)


def test_log_probabilities_that_are_not_finite_end_the_branch() -> None:
    engine = tiny_engine(ISOLATED)
    with torch.no_grad():
        engine.model.lm_head.weight[7] = float("nan")
    engine.submit(Sample([], [[5, 6, 7]]), **ASKING)
    assert [event.finish_reason for event in run_to_end(engine)] == ["error"]

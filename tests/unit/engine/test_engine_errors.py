"""A bad request is refused in one short line before anything is computed; running samples are unaffected."""

from __future__ import annotations

import math
from typing import Any

import pytest
from engines import COLUMNAR, decode, run_to_end, tiny_engine, tokens_by_branch
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import ResumeState, Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models as tiny
from parallelmind.model.patch import patch

VALID = Sample("the passage", ["who", "where is the answer"])
LIMITS = {"cache_tokens": 1024, "max_branches": 8, "max_prefill_tokens": 16}


def refused(sample: Sample, message: str, **settings: Any) -> Any:
    return pytest.param(sample, settings, message, id=message)


REFUSED = [
    refused(Sample(), r"branches=\[\]: a sample needs"),
    refused(Sample("the passage"), r"branches=\[\]: a sample needs at least one"),
    refused(Sample("the passage", ["who", ""]), r"branches\[1\]: holds no token"),
    refused(Sample("", [[]]), r"branches\[0\]: holds no token"),
    refused(Sample([5] * 5000, ["who"]), "max_new_tokens=64: .* exceed the model's 4096 positions"),
    refused(
        Sample("", [[5] * 4090]), "max_new_tokens=64: 4090 prompt tokens and 64 new ones.* 4096 positions"
    ),
    refused(Sample([5] * 1000, ["who"]), "branches: need up to .* tokens of cache, but the cache holds 1024"),
    refused(VALID, "max_new_tokens=1000000000: .* 4096 positions", max_new_tokens=10**9),
    refused(VALID, "max_new_tokens=-1: give a whole number", max_new_tokens=-1),
    refused(VALID, "max_new_tokens=0: no branch decodes; raise it", max_new_tokens=0),
    refused(VALID, "max_new_tokens=0: the reduce branch decodes nothing", max_new_tokens=0, reduce=[5]),
    refused(Sample("", ["who"] * 9), "branches: 9 given, 8 allowed"),
    refused(Sample("", ["who"] * 8), "branches: 9 given, 8 allowed", reduce="all"),
    refused(Sample("", [[5, 300]]), r"token id 300: the model's vocabulary is 0\.\.299"),
    refused(Sample([-1], ["who"]), r"token id -1: the model's vocabulary is 0\.\.299"),
    refused(Sample("", [[2**70]]), r"tokens=\[1180591620717411303424\]: give text, or a list of token ids"),
    refused(Sample("", [[1.5]]), r"tokens=\[1\.5\]: give text, or a list of token ids"),
    refused(Sample([None] * 10**5, ["who"]), "tokens=.*None.*: give text, or a list of token ids"),
    refused(VALID, r"token id 999: the model's vocabulary is 0\.\.299", reduce=[999]),
    refused(VALID, "reduce: holds no token", reduce=""),
    refused(VALID, "max_new_tokens=64: 4000 prompt tokens .*, after .* others, exceed", reduce=[5] * 4000),
    refused(VALID, r"logit_bias 300: the model's vocabulary is 0\.\.299", logit_bias={300: 1.0}),
    refused(VALID, r"logit_bias=.*: give ids from 0 up", logit_bias={-1: 1.0}),
    refused(VALID, "temperature=nan: give", temperature=math.nan),
    refused(VALID, "top_p=nan: give", per_branch=[{}, {"top_p": math.nan}]),
    refused(VALID, "stop=.*1000000 characters.*at most 1000", stop=["x" * 10**6]),
    refused(VALID, "per_branch: 1 settings for 2 branches", per_branch=[{}]),
    refused(VALID, "tempreature=1: unknown", tempreature=1),
    refused(VALID, "adapter='other': not loaded; choose from base", adapter="other"),
]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return decode(tiny_engine(COLUMNAR, **LIMITS), VALID, max_new_tokens=8, ignore_eos=True)


@pytest.mark.parametrize(("sample", "settings", "message"), REFUSED)
def test_a_bad_sample_is_refused_and_other_samples_continue(sample, settings, message, expected) -> None:
    engine = tiny_engine(COLUMNAR, **LIMITS)
    sample_id = engine.submit(VALID, max_new_tokens=8, ignore_eos=True)
    events = [event for _ in range(3) for event in engine.step()]
    held = engine.scheduler.block_manager.num_allocated
    hook = engine.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(UserError, match=message) as error:
        engine.submit(sample, **settings)
    hook.remove()
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)
    assert (engine.scheduler.block_manager.num_allocated, len(engine.scheduler.waiting)) == (held, 0)
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert tokens == {(sample_id, branch): expected[branch] for branch in range(2)}


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, r"branches\[0\]: holds no token"),
        ([300], {}, "token id 300"),
        ("who", {"temperature": math.nan}, "temperature=nan"),
        ("who", {"logit_bias": {300: 1}}, "logit_bias 300"),
        ([5] * 4090, {}, "max_new_tokens=64: 4090 prompt tokens and 64 new ones, after .* others, exceed"),
        ([5] * 1000, {}, "but the cache holds"),
    ],
)
def test_a_bad_branch_is_refused_and_its_siblings_continue(text, settings, message, expected) -> None:
    engine = tiny_engine(COLUMNAR, **LIMITS)
    sample_id = engine.submit(VALID, max_new_tokens=8, ignore_eos=True)
    events = [event for _ in range(3) for event in engine.step()]
    with pytest.raises(UserError, match=message):
        engine.join(sample_id, text, **settings)
    assert tokens_by_branch(events + run_to_end(engine)) == {
        (sample_id, branch): expected[branch] for branch in range(2)
    }
    with pytest.raises(UserError, match=f"sample {sample_id}: unknown or finished"):
        engine.join(sample_id, "who")


def test_a_branch_without_room_now_waits() -> None:
    engine = tiny_engine(cache_tokens=96)
    sample_id, other = (
        engine.submit(Sample("", [[5]]), max_new_tokens=40, ignore_eos=True) for _ in range(2)
    )
    events = [event for _ in range(34) for event in engine.step()]
    assert engine.scheduler.block_manager.num_available == 0
    assert engine.join(sample_id, [5] * 10, max_new_tokens=10, ignore_eos=True) == 1
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert {key: len(own) for key, own in tokens.items()} == {
        (sample_id, 0): 40,
        (sample_id, 1): 10,
        (other, 0): 40,
    }
    assert engine.scheduler.num_preemptions


@pytest.mark.parametrize("positions", ["time", "flat"])
def test_late_and_reduce_branches_stay_within_the_models_positions(positions: str) -> None:
    model = tiny_llama(max_position_embeddings=40)
    patch(model, RopeConfig(positions=positions))
    engine = Engine(model, tiny_tokenizer(), EngineConfig(512))
    with pytest.raises(UserError, match="after 31 others, exceed the model's 40 positions"):
        engine.submit(
            Sample("", [[5]]), per_branch=[{"max_new_tokens": 30}], reduce=[5] * 5, max_new_tokens=5
        )
    sample_id = engine.submit(Sample("", [[5]]), max_new_tokens=30, ignore_eos=True)
    for _ in range(30 - 1):
        engine.step()
    with pytest.raises(UserError, match="exceed the model's 40 positions"):
        engine.join(sample_id, [5] * 6, max_new_tokens=6)
    engine.join(sample_id, [5] * 4, max_new_tokens=5)


def test_no_branch_joins_after_the_reduce_branch_has_started() -> None:
    engine = tiny_engine()
    sample_id = engine.submit(Sample("", [[5]]), reduce=[6], max_new_tokens=3, ignore_eos=True)
    assert engine.join(sample_id, [7], max_new_tokens=3) == 2
    for _ in range(4):
        engine.step()
    with pytest.raises(UserError, match="branches: the reduce branch has started"):
        engine.join(sample_id, [8])


def test_a_model_without_parallel_branches_refuses_reduce() -> None:
    engine = Engine(tiny.tiny_model("mamba2"), tiny.tiny_tokenizer(), EngineConfig(512))
    with pytest.raises(UserError, match="branches: the model .* has no branches and no reduce; give main"):
        engine.submit(Sample([5], [[6]]), reduce=[7])


def test_cancelling_an_unknown_or_finished_sample_has_no_effect() -> None:
    engine = tiny_engine()
    sample_id = engine.submit(Sample("", [[5], [6]]), max_new_tokens=2, ignore_eos=True)
    for _ in range(3):
        engine.step()
    for arguments in ((sample_id,), (sample_id, 0), (99,), (99, 3)):
        engine.cancel(*arguments)
    assert not engine.busy


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (([0], [[5]], [None]), r"resume.start_times: has 1 entries for 2 segments after main; give one"),
        (([0, 0], [[5]], [None, None]), r"resume.token_ids: has 1 entries for 2"),
        (([None, 9], [[5], []], [None, None]), r"resume: branches\[0\] has 1 tokens and no start"),
        (
            ([9, 1], [[5], [6]], [None, None]),
            r"resume: branches\[1\] starts at 1, within main; give 4 or later",
        ),
        (([9, 9], [[5], [6] * 5], [None, None]), r"resume: branches\[1\] has 5 tokens of max_new_tokens=4"),
        (
            ([9, 9], [[5], [6]], [None, "bored"]),
            r"resume: branches\[1\] has finish_reason=bored; give None",
        ),
        (([9, 9], [[5], [10**6]], [None, None]), r"token id 1000000: the model's vocabulary is 0\.\."),
    ],
)
def test_a_progress_that_is_not_of_the_request_is_refused(state: Any, message: str) -> None:
    engine = tiny_engine()
    request = tokenize_request(
        tiny_tokenizer(), Sample([5, 6, 7, 8], [[5], [6]]), None, None, {"max_new_tokens": 4}
    )
    with pytest.raises(UserError, match=f"^{message}") as error:
        engine.enqueue(request, resume=ResumeState(*state))
    assert "\n" not in str(error.value)
    assert not engine.busy
    engine.enqueue(request, resume=ResumeState([4, 4], [[5], [6]], [None, "stop"]))
    assert {event.branch for event in run_to_end(engine)} == {0}

"""Decoding as on an accelerator, on a CPU: FlexAttention over the paged cache, and inputs in buffers.

FlexAttention runs without its compiler here but in the last test. Kernels for GPUs and captured graphs are in
tests/gpu.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED, decode, run_to_end, save_random_adapter, tiny_engine, tokens_by_branch
from families import variant
from flexing import flex_decoding, flex_on_cpu
from hypothesis import seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from invariants.test_engine import EFFORT, EngineMachine
from invariants.test_engine_trees import TreeMachine
from recording import CONFIGS
from torch._dynamo.utils import counters

from parallelmind.config import ModelConfig, RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.request import Sample, Segment
from parallelmind.engine.step_plan import ForwardPlan, Plan
from parallelmind.evaluation.laws import check_cached_decoding
from parallelmind.evaluation.probes import patched

MAIN = list(range(50, 90))
SAMPLES = (
    Sample(MAIN, [[5, 6, 7], [8], list(range(100, 120))]),
    Sample([], [[9, 10], [3]]),
    Sample(MAIN, [[11]]),
)
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])


@pytest.fixture
def flex() -> Iterator[None]:
    with flex_on_cpu(), flex_decoding():
        yield


def device_steps(engine: Engine) -> Any:
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner._device_steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["complex", "windows beside full attention", "latent attention"])
def test_law_3(name: str, flex: None) -> None:
    """Also with layers that look back for a few tokens only, and with keys and values of different sizes."""
    check_cached_decoding(variant(name, "sdpa"))


def decode_at_random(engine: Engine) -> list[tuple[int, int, int | None, str | None]]:
    """Samples of any shape come, fork, are joined, cancelled and preempted by a small cache."""
    rng, events = random.Random(0), []
    for number in range(24):
        main, prompts = (
            MAIN[: rng.choice([0, 9, 32, 40])],
            [[number + 3] * rng.randint(1, 20)] * rng.randint(1, 3),
        )
        reduce = [9, 10] if rng.random() < 0.3 else None
        temperature = rng.choice([0.0, 2.0])
        sample = engine.submit(
            Sample(main, prompts),
            reduce=reduce,
            max_new_tokens=rng.randint(2, 12),
            temperature=temperature,
            seed=number,
            ignore_eos=True,
        )
        for _ in range(rng.randint(0, 3)):
            events += engine.step()
        running = sorted(engine.samples.groups)
        chosen = rng.choice(running) if running else sample
        action = rng.choice(["fork", "join", "cancel", "cancel a branch", "preempt", "wait"])
        branches = (
            [branch.index for branch in engine.samples.groups[chosen].running_branches] if running else []
        )
        if action == "cancel":
            engine.cancel(chosen)
        elif action == "cancel a branch":
            engine.cancel(chosen, 0)
        elif action == "preempt" and (admitted := engine.scheduler.running):
            engine.scheduler.begin(Plan((rng.choice(admitted),), (), (), ForwardPlan(None, ()), ()))
        elif branches and action == "fork":
            engine.fork(chosen, branches[0], [[7, 8], Segment([9], [[10]])], max_new_tokens=3, seed=1)
        elif branches and action == "join" and engine.samples.groups[chosen].reduce_of(0) is None:
            engine.join(chosen, [11, 12], max_new_tokens=3, seed=2)
    events += run_to_end(engine)
    assert engine.scheduler.num_preemptions
    return [(event.sample, event.branch, event.token, event.finish_reason) for event in events]


@pytest.mark.slow
@BOTH
def test_random_steps_in_buffers_give_the_tokens_of_plain_steps(config: RopeConfig) -> None:
    """They need few sizes of buffers, each of which is compiled and captured once."""
    limits = {"cache_tokens": 192, "max_prefill_tokens": 24}
    expected = decode_at_random(tiny_engine(config, **limits))
    with flex_on_cpu(), flex_decoding():
        engine = tiny_engine(config, **limits)
        assert decode_at_random(engine) == expected
    assert 3 < len(device_steps(engine)._buffers) <= 16


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [CONFIGS[0], CONFIGS[5]], ids=lambda part: f"{part.visibility}-{part.positions}"
)
@pytest.mark.parametrize("kind", [EngineMachine, TreeMachine], ids=["samples", "trees"])
def test_laws_3_and_4_at_random(kind: type[RuleBasedStateMachine], config: RopeConfig, flex: None) -> None:
    """A token that saw a sibling against its visibility would differ from one full forward pass."""
    models = [variant(name, "sdpa") for name in ("shared", "windows beside full attention")]

    @seed(0)
    def machine() -> RuleBasedStateMachine:
        return kind([*models, *models], Counter())  # type: ignore[call-arg]

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(patched(model, config))
        effort = settings(EFFORT, max_examples=3, stateful_step_count=20, deadline=None)
        run_state_machine_as_test(machine, settings=effort)


@BOTH
def test_a_warm_engine_decodes_the_same_tokens(config: RopeConfig, flex: None) -> None:
    """The warm-up has all sizes in which up to 64 branches decode, and those of prompts. Others use them.

    It leaves nothing behind.
    """
    engine, other = tiny_engine(config, cache_tokens=256), tiny_engine(config, cache_tokens=256)
    assert engine.warm_up()
    warm = set(device_steps(engine)._buffers)
    prompts = [[3 + index] for index in range(9)]
    for number in (1, 9):
        sample = Sample(MAIN[:5], prompts[:number])
        assert decode(engine, sample, **SETTINGS) == decode(other, sample, **SETTINGS)
    used = set(device_steps(engine)._buffers)
    assert {bucket.kernel_size() for bucket in used} == {bucket.kernel_size() for bucket in warm}
    assert {bucket for bucket in used if bucket.sampled == bucket.tokens} == {
        bucket for bucket in warm if bucket.sampled == bucket.tokens
    }


def test_adapters_by_row(tmp_path: Any) -> None:
    """One pass for all samples gives the tokens of an engine of a CPU that decodes one after another."""
    names = ("a", "b", "base")
    plain, engine = tiny_engine(ISOLATED), tiny_engine(ISOLATED)
    for number, name in enumerate(("a", "b")):
        save_random_adapter(tmp_path / name, ModelConfig(base_model="tiny"), number)
        plain.load_adapter(name, tmp_path / name)
    expected = [decode(plain, SAMPLES[0], adapter=name, **SETTINGS) for name in names]
    assert len({str(tokens) for tokens in expected}) == 3, "each adapter changes tokens"
    with flex_on_cpu(), flex_decoding():
        for name in ("a", "b"):
            engine.load_adapter(name, tmp_path / name)
        numbers = [engine.submit(SAMPLES[0], adapter=name, **SETTINGS) for name in names]
        decoded = tokens_by_branch(run_to_end(engine))
        assert engine.runner.batches_adapters
    assert [[decoded[number, branch] for branch in range(3)] for number in numbers] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sample"), [(COLUMNAR, SAMPLES[0]), (ISOLATED, SAMPLES[1])], ids=["columnar", "isolated"]
)
def test_the_compiled_kernel_reads_the_blocks_of_the_table(config: RopeConfig, sample: Sample) -> None:
    """Once for each size. The compiler of CPUs returns no log-sum-exp, so no token is in several tiles."""
    expected = decode(tiny_engine(config), sample, **SETTINGS)
    with flex_decoding():
        engine = tiny_engine(config, cache_tokens=512)
        before = counters["stats"]["unique_graphs"]
        assert [decode(engine, sample, **SETTINGS) for _ in range(2)] == [expected] * 2
    sizes = {bucket.kernel_size() for bucket in device_steps(engine)._buffers}
    assert counters["stats"]["unique_graphs"] - before == len(sizes)

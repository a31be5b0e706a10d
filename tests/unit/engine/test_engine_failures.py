"""A failed pass, logits that are not finite, and a tokenizer that raises end what they concern only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from engines import (
    COLUMNAR,
    ISOLATED,
    decode,
    run_to_end,
    saved_adapters,
    step_interrupted,
    tiny_engine,
    tokens_by_branch,
)
from flexing import flex_decoding, flex_on_cpu
from peft.tuners.lora import LoraLayer
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine import planner, scheduler
from parallelmind.engine.block_manager import BLOCK, BlockManager
from parallelmind.engine.engine import Engine
from parallelmind.engine.generate import generate, stream
from parallelmind.engine.output import Event
from parallelmind.engine.request import ResumeState, Sample
from parallelmind.engine.scheduler import EngineConfig, Scheduler
from parallelmind.engine.token_scheduler import schedule_tokens
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import DecodingError
from parallelmind.evaluation import tiny_models as tiny
from parallelmind.model import forward_context
from parallelmind.model.patch import patch
from parallelmind.model.structure import causal_lm

MAIN = list(range(50, 90))
LIMITS = {"cache_tokens": 1024, "max_prefill_tokens": 16}  # mains of 40 tokens are read in three steps
Tokens = dict[tuple[int, int], list[int]]


class NthCallError(RuntimeError):
    """What the model raises; memory errors of torch are of the same type."""


@contextmanager
def failing_at(model: torch.nn.Module, call: int) -> Iterator[list[int]]:
    """Raise after the decoder's first layer in the call with this number; yields the calls so far."""
    calls: list[int] = []
    layer = next(module for name, module in causal_lm(model).named_modules() if name.endswith("layers.0"))

    def count(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) - 1 == call:
            raise NthCallError("DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate 9 bytes")

    hook = layer.register_forward_hook(count)
    yield calls
    hook.remove()


def make_engine(model: Any, config: RopeConfig | None) -> Engine:
    if config is not None:
        patch(model, config)
    return Engine(model, tiny_tokenizer(), EngineConfig(**LIMITS))


ENGINES: dict[str, Callable[[], Engine]] = {
    "columnar": lambda: make_engine(tiny_llama(), COLUMNAR),
    "isolated": lambda: make_engine(tiny_llama(), ISOLATED),
    "dense masks": lambda: make_engine(tiny_llama(attn_implementation="eager"), COLUMNAR),
    "a row for each branch": lambda: make_engine(tiny.tiny_model("mamba2"), None),
}


def submit_all(engine: Engine, adapters: tuple[str | None, ...] = (None,)) -> list[int]:
    """Samples with a shared main, with a main of their own, with a reduce branch and without main."""
    settings: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True, "temperature": 1.0, "seed": 7}
    reduce = None if engine.fallback_reason else [41, 42]
    return [
        engine.submit(sample, reduce=last, adapter=adapter, **settings)
        for adapter in adapters
        for sample, last in (
            (Sample(MAIN, [[5, 6, 7], [8]]), None),
            (Sample(MAIN, [[9, 10]]), reduce),
            (Sample(MAIN[::-1][:20], [[11], [12, 13]]), None),
            (Sample([], [[14, 15]]), None),
        )
    ]


def run_through_failures(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        try:
            events += engine.step()
        except NthCallError:
            events += engine.take_events()
    return events


def step_into(engine: Engine, events: list[Event]) -> None:
    """Step until the engine is idle or raises, and keep the events of all steps."""
    while engine.busy:
        events += engine.step()


def by_submission(events: list[Event], ids: list[int]) -> Tokens:
    """The tokens of every branch, by the position of its sample in `ids`."""
    tokens = tokens_by_branch(events)
    return {(ids.index(sample), branch): own for (sample, branch), own in tokens.items() if sample in ids}


def check_every_failure(engine: Engine, adapters: tuple[str | None, ...] = (None,), stride: int = 1) -> None:
    """Fail in each forward pass in turn, or in one of `stride`; compare with decoding without failures."""
    submit_all(engine, adapters)
    run_to_end(engine)  # the first pass finds out which adapters can share a pass
    engine.scheduler.block_manager = BlockManager(LIMITS["cache_tokens"] // BLOCK)
    with failing_at(engine.model, -1) as calls:
        ids = submit_all(engine, adapters)
        expected = by_submission(run_to_end(engine), ids)
    for call in range(0, len(calls), stride):
        engine.scheduler.block_manager = BlockManager(LIMITS["cache_tokens"] // BLOCK)  # nothing is cached
        with failing_at(engine.model, call):
            ids = submit_all(engine, adapters)
            events = run_through_failures(engine)
        failed = {event.sample for event in events if event.finish_reason == "error"}
        assert failed
        check_failed_events(events, failed)
        tokens = by_submission(events, ids)
        for place, number in enumerate(ids):
            same = [tokens.get(key) == own for key, own in expected.items() if key[0] == place]
            assert all(same) or number in failed
        check_empty(engine)
        ids = submit_all(engine, adapters)
        assert by_submission(run_to_end(engine), ids) == expected, f"after a failure in pass {call}"
        check_empty(engine)


def check_failed_events(events: list[Event], failed: set[int]) -> None:
    last = {(event.sample, event.branch): event for event in events if event.sample in failed}
    assert {event.finish_reason for event in last.values()} <= {"error", "length"}
    for event in last.values():
        if event.finish_reason == "error":
            assert event.error is not None
            assert event.error.startswith("the forward pass failed (NthCallError: DefaultCPUAllocator")
            assert "\n" not in event.error
            assert (event.token, event.text) == (None, "")


def check_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.held_tokens, stats.running_samples, stats.waiting_samples) == (0, 0, 0)
    assert engine.scheduler.block_manager.num_allocated == 0
    assert not getattr(engine.runner, "_states", {})
    assert not engine.busy


@pytest.mark.parametrize("kind", ENGINES)
def test_after_a_failure_in_any_forward_pass_all_samples_decode_as_without_one(kind: str) -> None:
    check_every_failure(ENGINES[kind](), stride=11 if kind == "a row for each branch" else 1)


def test_a_failure_with_adapters_ends_the_samples_of_its_pass(tmp_path: Path) -> None:
    engine = ENGINES["isolated"]()
    for name, folder in zip(("one", "two"), saved_adapters(tmp_path), strict=True):
        engine.load_adapter(name, folder)
    check_every_failure(engine, ("one", "base", "two"), stride=4)


def test_a_main_whose_reading_failed_is_not_shared() -> None:
    """Before, later samples with the same main attended to keys and values that were never computed."""
    sample, settings = Sample(MAIN, [[5, 6]]), {"max_new_tokens": 6, "ignore_eos": True}
    fresh = tiny_engine(COLUMNAR, **LIMITS)
    fresh.submit(sample, **settings)
    expected = tokens_by_branch(run_to_end(fresh))[0, 0]
    engine = tiny_engine(COLUMNAR, **LIMITS)
    engine.submit(sample, **settings)
    with failing_at(engine.model, 0), pytest.raises(NthCallError):
        engine.step()
    assert [event.finish_reason for event in run_to_end(engine)] == ["error"]
    again = engine.submit(sample, **settings)
    assert tokens_by_branch(run_to_end(engine))[again, 0] == expected


def test_an_interrupt_leaves_the_engine_usable() -> None:
    engine = ENGINES["columnar"]()
    ids = submit_all(engine)
    expected = by_submission(run_to_end(engine), ids)
    for module in (engine.model, causal_lm(engine.model).get_decoder().layers[0]):
        hook = module.register_forward_pre_hook(interrupt)
        submit_all(engine)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        hook.remove()
        assert forward_context.CURRENT_CALL.get() is None
    run_to_end(engine)
    check_empty(engine)
    ids = submit_all(engine)
    assert by_submission(run_to_end(engine), ids) == expected


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_a_step_is_planned_changes_nothing(error: type[BaseException]) -> None:
    engine = ENGINES["isolated"]()
    ids = submit_all(engine)
    expected = by_submission(run_to_end(engine), ids)
    for call in range(4):
        engine.scheduler.block_manager = BlockManager(LIMITS["cache_tokens"] // BLOCK)
        ids = submit_all(engine)
        calls = [*[mock.DEFAULT] * call, error]
        choose = mock.patch.object(planner, "schedule_tokens", side_effect=calls, wraps=schedule_tokens)
        events: list[Event] = []
        with choose, pytest.raises(error):
            step_into(engine, events)
        assert by_submission(events + run_to_end(engine), ids) == expected
        check_empty(engine)


def test_an_interrupt_while_a_step_begins_ends_its_samples_with_an_error() -> None:
    engine = ENGINES["isolated"]()
    ids = submit_all(engine)
    expected = by_submission(run_to_end(engine), ids)
    for method in ("_adopt", "_stage"):
        submit_all(engine)
        where = Scheduler if method == "_adopt" else scheduler
        with (
            mock.patch.object(where, method, side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            run_to_end(engine)
        assert {event.finish_reason for event in run_to_end(engine)} >= {"error"}
        check_empty(engine)
        ids = submit_all(engine)
        assert by_submission(run_to_end(engine), ids) == expected


@pytest.mark.parametrize("method", ["set_adapter", "enable_adapters"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_between_two_layers_of_an_adapter_switch_mixes_no_adapters(
    error: type[BaseException], method: str, tmp_path: Path
) -> None:
    """Before, the next samples were decoded with some layers of another adapter."""
    engine = ENGINES["isolated"]()
    for name, folder in zip(("one", "two"), saved_adapters(tmp_path), strict=True):
        engine.load_adapter(name, folder)
    names, original = ("one", "base", "two"), getattr(LoraLayer, method)

    def tokens(name: str) -> list[int]:
        number = engine.submit(Sample(MAIN, [[5, 6]]), adapter=name, max_new_tokens=4, ignore_eos=True)
        return tokens_by_branch(run_to_end(engine))[number, 0]

    expected = {name: tokens(name) for name in names}
    for before, after in permutations(names, 2):
        tokens(before)
        calls: list[int] = []

        def fail_later(*args: Any, calls: list[int] = calls, **settings: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise error
            return original(*args, **settings)

        engine.submit(Sample(MAIN, [[5, 6]]), adapter=after, max_new_tokens=4)
        with mock.patch.object(LoraLayer, method, fail_later), suppress(error):
            run_to_end(engine)
        run_to_end(engine)
        assert {name: tokens(name) for name in (before, after)} == {
            name: expected[name] for name in (before, after)
        }


def test_a_sample_that_is_cancelled_before_a_pass_that_fails_leaves_no_state() -> None:
    engine = ENGINES["a row for each branch"]()
    number = engine.submit(Sample([5, 6, 7], [[5], [6]]), max_new_tokens=4)
    engine.step()
    with failing_at(engine.model, 0), pytest.raises(NthCallError):
        step_interrupted(engine, lambda: engine.cancel(number))
    engine.take_events()
    assert not engine.runner._states  # type: ignore[union-attr]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_samples_that_wait_are_not_affected_by_a_failure() -> None:
    engine = tiny_engine(ISOLATED, cache_tokens=64)
    settings = {"max_new_tokens": 20, "ignore_eos": True}
    first, second = (engine.submit(Sample([], [[token] * 40]), **settings) for token in (5, 6))
    with failing_at(engine.model, 3):
        events = run_through_failures(engine)
    reasons = {event.sample: event.finish_reason for event in events if event.finish_reason}
    assert reasons == {first: "error", second: "length"}


def test_a_sample_that_the_cache_cannot_hold_alone_ends_with_an_error() -> None:
    engine = tiny_engine(ISOLATED, cache_tokens=64)
    engine.submit(Sample([], [[5] * 20]), max_new_tokens=40, ignore_eos=True)
    engine.step()
    engine.scheduler.block_manager.hold([2, 3])  # never freed
    events = run_to_end(engine)
    assert (len(events), events[-1].finish_reason) == (13, "error")
    assert events[-1].error == "the cache has no room for the sample; raise cache_tokens"


# Logits that are not finite


def bad_row(model: torch.nn.Module, token: int, value: float) -> None:
    """Let the input embedding of a token be a bad number, as a damaged file would."""
    with torch.no_grad():
        causal_lm(model).get_input_embeddings().weight[token, 3] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"logprobs": 3}, {"repetition_penalty": 1.2}])
def test_logits_that_are_not_finite_end_their_branch_with_an_error(value: float, settings: Any) -> None:
    engine = tiny_engine(ISOLATED)
    bad_row(engine.model, 99, value)
    settings = {"max_new_tokens": 4, "ignore_eos": True, **settings}
    sample = engine.submit(Sample([], [[5, 99], [6, 7], [8]]), **settings, seed=1)
    other = engine.submit(Sample(MAIN, [[5]]), **settings, seed=2)
    events = run_to_end(engine)
    bad = [event for event in events if (event.sample, event.branch) == (sample, 0)]
    assert [(event.token, event.finish_reason, event.logprob) for event in bad] == [(None, "error", None)]
    assert bad[0].error == "the model's logits are not finite (NaN or infinity)"
    good = tokens_by_branch([event for event in events if event not in bad])
    clean = tiny_engine(ISOLATED)
    clean.submit(Sample([], [[5], [6, 7], [8]]), **settings, seed=1)
    clean.submit(Sample(MAIN, [[5]]), **settings, seed=2)
    expected = tokens_by_branch(run_to_end(clean))
    assert good == {key: expected[key] for key in ((sample, 1), (sample, 2), (other, 0))}
    check_empty(engine)


@pytest.mark.parametrize("kind", ["columnar", "isolated", "dense masks"])
@pytest.mark.parametrize("call", [0, 2])
def test_a_main_that_was_once_read_with_values_that_are_not_finite_is_not_shared(
    kind: str, call: int
) -> None:
    """Before, each later sample with this main ended with an error, too."""
    engine, sample = ENGINES[kind](), Sample(MAIN, [[5, 6], [7]])
    settings: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
    expected = decode(ENGINES[kind](), sample, **settings)
    layer = causal_lm(engine.model).get_decoder().layers[0]
    calls: list[int] = []

    def damage(_: Any, __: Any, output: Any) -> Any:
        calls.append(1)
        return output * float("nan") if len(calls) - 1 == call else output

    with layer.register_forward_hook(damage):
        engine.submit(sample, **settings)
        assert "error" in {event.finish_reason for event in run_to_end(engine)}
    assert decode(engine, sample, **settings) == expected
    check_empty(engine)


@pytest.mark.parametrize("kind", ["columnar", "isolated", "dense masks"])
def test_a_sample_that_reads_blocks_that_are_found_not_to_be_finite_is_computed_anew(kind: str) -> None:
    """The first part of a main is damaged; another sample reads it before a logit tells."""
    engine, settings = ENGINES[kind](), {"max_new_tokens": 6, "ignore_eos": True}
    sample = Sample(MAIN, [[5, 6], [7]])
    expected = decode(ENGINES[kind](), sample, **settings)
    layer = causal_lm(engine.model).get_decoder().layers[0]
    damaged = engine.submit(Sample(MAIN, [[8]]), **settings)
    with layer.register_forward_hook(lambda *args: args[-1] * float("nan")):
        events = engine.step()
    reader = engine.submit(sample, **settings)
    events += run_to_end(engine)
    reasons = {event.finish_reason for event in events if event.sample == damaged and event.finish_reason}
    tokens = tokens_by_branch(events)
    assert reasons == {"error"}
    assert [tokens[reader, branch] for branch in range(2)] == expected
    assert engine.scheduler.num_reused_tokens
    check_empty(engine)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_sample_whose_logits_are_not_finite_does_not_touch_the_others(kind: str) -> None:
    def outputs(token: int) -> Tokens:
        engine = ENGINES[kind]()
        bad_row(engine.model, 99, float("nan"))
        settings: dict[str, Any] = {"max_new_tokens": 5, "ignore_eos": True}
        engine.submit(Sample(MAIN[:3], [[5]]), **settings)
        engine.submit(Sample([token] * 20, [[5, 6]]), **settings)
        for length in (3, 30, 40):
            engine.submit(Sample(MAIN[:length], [[5, 6, 7], [8]][: 2 if length == 40 else 1]), **settings)
        return {key: tokens for key, tokens in tokens_by_branch(run_to_end(engine)).items() if key[0] != 1}

    assert outputs(99) == outputs(98)


@pytest.mark.parametrize("kind", ["columnar", "isolated"])
def test_the_same_with_the_attention_of_an_accelerator(kind: str) -> None:
    """Uncompiled, it computes with the values of the whole cache."""
    with flex_on_cpu(), flex_decoding():
        for call in (2, 4):  # 4: a step that is computed ahead, where samples are isolated
            test_a_main_that_was_once_read_with_values_that_are_not_finite_is_not_shared(kind, call)
        test_a_sample_that_reads_blocks_that_are_found_not_to_be_finite_is_computed_anew(kind)
        test_a_sample_whose_logits_are_not_finite_does_not_touch_the_others(kind)


@pytest.mark.slow
def test_a_pass_that_fails_while_the_host_waits_for_the_one_before_ends_the_samples_in_it() -> None:
    with flex_on_cpu(), flex_decoding():
        check_every_failure(ENGINES["isolated"](), stride=5)


def test_generate_raises_for_a_branch_that_ends_with_an_error() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    patch(model, ISOLATED)
    bad_row(model, 99, float("nan"))
    sample = Sample([], [[5], [6, 99]])
    reasons = {event.branch: event.finish_reason for event in stream(model, tokenizer, sample)}
    assert reasons[1] == "error"
    with pytest.raises(DecodingError, match=r"^branches\[1\]: the model's logits are not finite"):
        generate(model, tokenizer, sample)


# Tokens that cannot be decoded


class RaisingTokenizer:
    """A tokenizer in Python that raises for one id, as for one that its vocabulary lacks."""

    eos_token_id = None

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        if 77 in token_ids:
            raise TypeError("sequence item 0: expected str instance, NoneType found")
        return "".join(map(chr, token_ids))


def test_a_token_that_the_tokenizer_cannot_decode_ends_its_branch() -> None:
    model = tiny_llama()
    patch(model, ISOLATED)
    engine = Engine(model, RaisingTokenizer(), EngineConfig(1024))  # type: ignore[arg-type]
    sample = Sample([], [[5], [6]])
    engine.submit(sample, per_branch=[{"logit_bias": {77: 100}}, {}], reduce=[9], max_new_tokens=3)
    events = run_to_end(engine)
    assert [event.error for event in events if event.branch == 0] == [
        "token 77 cannot be decoded (TypeError: sequence item 0: expected str instance, NoneType found)"
    ]
    assert [event.finish_reason for event in events if event.branch in (1, 2)] == [None, None, "length"] * 2
    check_empty(engine)


def test_a_sample_is_resumed_with_a_branch_that_ended_with_an_error() -> None:
    model = tiny_llama()
    patch(model, ISOLATED)
    engine = Engine(model, RaisingTokenizer(), EngineConfig(1024))  # type: ignore[arg-type]
    request = tokenize_request(tiny_tokenizer(), Sample([], [[5], [6]]), None, None, {"max_new_tokens": 3})
    engine.enqueue(request, resume=ResumeState([0, 0], [[8, 77], [9]], ["error", None]))
    assert {event.branch for event in run_to_end(engine)} == {1}

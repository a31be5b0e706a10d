"""The decoding engine: step time against the bare model, cost by context length, continuous batching."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from transformers import DynamicCache

import parallelmind as pm
from benchmarks.decoding import BRANCHES, MAIN_TOKENS, patched, plain, prompts, shared_main
from benchmarks.harness import Bench, ratio, seconds
from benchmarks.text import tokenizer
from parallelmind.engine.model_runner import ModelRunner

_CONTEXTS = (256, 1024, 4096)
_STEPS, _MAX_NEW_TOKENS = 12, 512
_REQUESTS, _BATCH = 32, 8


def _decoding_engine(main: int, branches: int) -> pm.Engine:
    """An engine with `branches` decoding branches on a main of `main` tokens; each has produced a token."""
    engine = pm.Engine(patched("isolated", "float32"), tokenizer())
    engine.submit(
        pm.Sample(shared_main(main), prompts(branches)), max_new_tokens=_MAX_NEW_TOKENS, ignore_eos=True
    )
    while len(engine.step()) < branches:
        pass
    return engine


def _step_vs_bare() -> float:
    """Time of a step over time of one forward pass of as many tokens on a cache of the same length.

    The baseline's cache is cropped after every pass, so it does not grow.
    """
    engine = _decoding_engine(MAIN_TOKENS, BRANCHES)
    model, ids = plain("float32"), torch.tensor([shared_main(MAIN_TOKENS)])
    with torch.inference_mode():
        past = DynamicCache(config=model.config)
        model(ids, past_key_values=past)

    def bare() -> None:
        with torch.inference_mode():
            model(torch.tensor([list(range(100, 100 + BRANCHES))]), past_key_values=past)
            past.crop(-BRANCHES)

    return ratio(engine.step, bare, repeats=2 * _STEPS)


@cache
def _costs(main: int) -> tuple[float, float, float]:
    """Costs of a step of eight branches: total ms, ms outside the model, MB of weights and KV cache read."""
    engine = _decoding_engine(main, 8)
    forward = engine.runner
    assert isinstance(forward, ModelRunner)
    model, inside = forward.model, 0.0

    def timed(*args: object, **kwargs: object) -> object:
        nonlocal inside
        outputs: list[object] = []
        inside += seconds(lambda: outputs.append(model(*args, **kwargs)))
        return outputs[0]

    engine.step()
    forward.model = _TimedModel(model, timed)  # type: ignore[assignment]
    total = seconds(lambda: [engine.step() for _ in range(_STEPS)])
    weights = sum(weight.nbytes for weight in model.parameters())
    keys = forward.cache.bytes_per_token() * (main + sum(map(len, prompts(8))))
    return 1e3 * total / _STEPS, 1e3 * (total - inside) / _STEPS, (weights + keys) / 1e6


def _cost(main: int, index: int) -> float:
    return _costs(main)[index]


class _TimedModel:
    """Wraps a model: calls go to `call`, attributes to the model."""

    def __init__(self, model: torch.nn.Module, call: Callable[..., object]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


def _mixed_requests() -> list[tuple[list[int], int]]:
    """Return prompts with their number of new tokens, from 8 to 128."""
    lengths = np.random.default_rng(0).integers(8, 129, _REQUESTS)
    texts = prompts(_REQUESTS)
    return [(texts[index % len(texts)], int(length)) for index, length in enumerate(lengths)]


@cache
def _warm_engine() -> pm.Engine:
    """An engine as it serves: compiled, where that is possible."""
    engine = pm.Engine(patched("isolated", "float32"), tokenizer())
    engine.warm_up()
    return engine


def _continuous() -> None:
    """Continuous batching: each request arrives at a random step and starts at once."""
    engine, requests = _warm_engine(), _mixed_requests()
    arrivals, step = np.sort(np.random.default_rng(1).integers(0, 64, _REQUESTS)), 0
    while requests or engine.busy:
        while requests and arrivals[_REQUESTS - len(requests)] <= step:
            text, length = requests.pop(0)
            engine.submit(pm.Sample(branches=[text]), max_new_tokens=length, ignore_eos=True)
        engine.step()
        step += 1


def _fixed() -> None:
    """Fixed batches: eight requests at a time, each batch until its longest request has finished."""
    engine, requests = _warm_engine(), _mixed_requests()
    while requests:
        for text, length in requests[:_BATCH]:
            engine.submit(pm.Sample(branches=[text]), max_new_tokens=length, ignore_eos=True)
        del requests[:_BATCH]
        while engine.busy:
            engine.step()


BENCHES = [
    Bench("decoding.step_vs_bare_forward", 1.15, "lower", "ratio", _step_vs_bare),
    *(Bench(f"decoding.step_ms_{n}", None, "lower", "ms", partial(_cost, n, 0)) for n in _CONTEXTS),
    *(
        Bench(f"decoding.step_outside_model_ms_{n}", None, "lower", "ms", partial(_cost, n, 1))
        for n in _CONTEXTS
    ),
    *(Bench(f"decoding.step_megabytes_{n}", None, "lower", "MB", partial(_cost, n, 2)) for n in _CONTEXTS),
    Bench(
        "decoding.continuous_vs_fixed", 1.6, "higher", "ratio", partial(ratio, _fixed, _continuous, repeats=3)
    ),
]

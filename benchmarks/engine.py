"""The decoding engine: one step against the bare model, what a step costs as the context grows, and
continuous batching.
"""

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
_STEPS, _MOST = 12, 512
_REQUESTS, _BATCH = 32, 8


def _talking(main: int, branches: int) -> pm.Engine:
    """An engine whose branches, on a main of so many tokens, have all said something."""
    engine = pm.Engine(patched("isolated", "float32"), tokenizer())
    engine.submit(pm.Sample(shared_main(main), prompts(branches)), max_new_tokens=_MOST, ignore_eos=True)
    while len(engine.step()) < branches:
        pass
    return engine


def _step_vs_bare() -> float:
    """A step of all branches over one forward of as many tokens, on a cache of the same length that is not
    grown.
    """
    engine = _talking(MAIN_TOKENS, BRANCHES)
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
    """Of a step of eight branches: milliseconds in all, milliseconds outside of the model, megabytes that
    must be read.
    """
    engine = _talking(main, 8)
    forward = engine.forward
    assert isinstance(forward, ModelRunner)
    model, inside = forward.model, 0.0

    def timed(*args: object, **kwargs: object) -> object:
        nonlocal inside
        found: list[object] = []
        inside += seconds(lambda: found.append(model(*args, **kwargs)))
        return found[0]

    engine.step()
    forward.model = _Timed(model, timed)  # type: ignore[assignment]
    total = seconds(lambda: [engine.step() for _ in range(_STEPS)])
    weights = sum(weight.nbytes for weight in model.parameters())
    keys = forward.cache.bytes_per_token() * (main + sum(map(len, prompts(8))))
    return 1e3 * total / _STEPS, 1e3 * (total - inside) / _STEPS, (weights + keys) / 1e6


def _cost(main: int, which: int) -> float:
    return _costs(main)[which]


class _Timed:
    """A model that counts the time of its calls."""

    def __init__(self, model: torch.nn.Module, call: Callable[..., object]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


def _mixed() -> list[tuple[list[int], int]]:
    """Prompts, and new tokens from 8 to 128."""
    lengths = np.random.default_rng(0).integers(8, 129, _REQUESTS)
    texts = prompts(_REQUESTS)
    return [(texts[place % len(texts)], int(length)) for place, length in enumerate(lengths)]


def _continuous() -> None:
    """Every request is there at a random step, and begins at once."""
    engine, requests = pm.Engine(patched("isolated", "float32"), tokenizer()), _mixed()
    arrivals, step = np.sort(np.random.default_rng(1).integers(0, 64, _REQUESTS)), 0
    while requests or engine.busy:
        while requests and arrivals[_REQUESTS - len(requests)] <= step:
            text, length = requests.pop(0)
            engine.submit(pm.Sample(branches=[text]), max_new_tokens=length, ignore_eos=True)
        engine.step()
        step += 1


def _fixed() -> None:
    """The same engine and requests, all there from the start: eight at a time, until the longest of them has
    ended.
    """
    engine, requests = pm.Engine(patched("isolated", "float32"), tokenizer()), _mixed()
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
        "decoding.continuous_vs_fixed", 1.5, "higher", "ratio", partial(ratio, _fixed, _continuous, repeats=1)
    ),
]

"""Operators that one decoding step launches for each decoder layer, and code that is compiled anew.

All are counts, which do not depend on the machine. Views and allocations launch nothing and are left out. An
operator of the engine is one launch; its product with adapters by row is two, the base's and the adapters'.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

import parallelmind as pm
from benchmarks.decoding import patched, prompts, shared_main
from benchmarks.harness import Bench
from benchmarks.text import tokenizer
from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.evaluation.tiny_models import tiny_model, tiny_tokenizer
from parallelmind.model import step_ops
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch

_LAYERS = (2, 4)  # of two models, whose difference is that of two layers
_PROMPT, _CACHE_TOKENS = [5, 6, 7], 256
_STEPS, _NEW_TOKENS = 1000, 24
_ALLOCATIONS = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "lift_fresh"}


class LaunchCounter(TorchDispatchMode):
    """Counts launches.

    per_product: launches of the engine's operator for a product.
    """

    def __init__(self, per_product: int) -> None:
        super().__init__()
        self.count, self._per_product = 0, per_product

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is step_ops.linear.default:
            self.count += self._per_product
        elif not func.is_view and func.overloadpacket.__name__ not in _ALLOCATIONS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def per_layer(decoding_step: Callable[[int], Callable[[], object]], per_product: int = 1) -> float:
    """Launches per layer of `decoding_step(layers)`, which prepares a step of a model of as many layers."""
    totals = []
    for layers in _LAYERS:
        step = decoding_step(layers)
        with LaunchCounter(per_product) as counter:
            step()
        totals.append(counter.count)
    return (totals[1] - totals[0]) / (_LAYERS[1] - _LAYERS[0])


def engine_step(layers: int, with_adapter: bool = False) -> Callable[[], object]:
    """A step of two isolated branches."""
    model, config = _llama(layers), RopeConfig(visibility="isolated")
    patch(model, config)
    adapted: Any = add_lora(model, LoraConfig(), seed=0) if with_adapter else model
    engine = pm.Engine(adapted, tiny_tokenizer(), pm.EngineConfig(_CACHE_TOKENS))
    engine.submit(pm.Sample(_PROMPT, [[8], [9, 10]]), max_new_tokens=_NEW_TOKENS, ignore_eos=True)
    for _ in range(3):
        engine.step()
    return engine.step


def hugging_face_step(layers: int) -> Callable[[], object]:
    """A forward pass over one token for each of two cached texts."""
    model, cache = _llama(layers), DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([_PROMPT, _PROMPT]), past_key_values=cache)

    @torch.inference_mode()
    def step() -> object:
        return model(torch.tensor([[8], [9]]), past_key_values=cache)

    return step


def _llama(layers: int) -> PreTrainedModel:
    """A model of the architecture of the default base model."""
    return tiny_model("llama", "sdpa", num_hidden_layers=layers)


def _compiled_ops_per_layer() -> float:
    """Kernels that the compiler generates, and the engine's own operators, which it calls."""
    counts = []
    for layers in _LAYERS:
        model = _llama(layers)
        patch(model, RopeConfig(visibility="isolated"))
        before = metrics.generated_kernel_count
        assert pm.Engine(model, tiny_tokenizer(), pm.EngineConfig(_CACHE_TOKENS)).warm_up()
        counts.append(metrics.generated_kernel_count - before)
    num_own = 5  # four products and the attention
    return (counts[1] - counts[0]) / (_LAYERS[1] - _LAYERS[0]) + num_own


def _recompiles() -> float:
    """Compilations during random steps of a warm engine, and passes that run uncompiled."""
    engine, rng = (
        pm.Engine(patched("isolated", "float32"), tokenizer(), pm.EngineConfig(1 << 14)),
        random.Random(0),
    )
    assert engine.warm_up()
    assert isinstance(engine.runner, ModelRunner)
    num_passes = _count_calls(engine.runner, "_forward")
    num_compiled = _count_calls(engine.runner, "_compiled")
    main, texts = shared_main(256), prompts(16)
    before = counters["stats"]["unique_graphs"]
    for _ in range(_STEPS):
        if rng.random() < 0.1 or not engine.busy:
            sample = pm.Sample(main[: rng.choice([0, 9, 256])], rng.sample(texts, rng.randint(1, 4)))
            engine.submit(sample, max_new_tokens=rng.randint(1, _NEW_TOKENS), ignore_eos=True)
        engine.step()
    return counters["stats"]["unique_graphs"] - before + num_passes() - num_compiled()


def _count_calls(owner: Any, name: str) -> Callable[[], int]:
    """Count the calls of a method of an object from now on."""
    function, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    setattr(owner, name, counted)
    return lambda: len(calls)


BENCHES = [
    Bench("decoding.ops_per_layer_hf", None, "lower", "operators", partial(per_layer, hugging_face_step)),
    Bench("decoding.ops_per_layer_isolated", 36, "lower", "operators", partial(per_layer, engine_step)),
    Bench(
        "decoding.ops_per_layer_lora",
        60,
        "lower",
        "operators",
        partial(per_layer, partial(engine_step, with_adapter=True), per_product=2),
    ),
    Bench("decoding.compiled_ops_per_layer", None, "lower", "operators", _compiled_ops_per_layer),
    Bench("decoding.recompiles_after_warmup", 0, "lower", "graphs", _recompiles),
]

"""Work of the host in a decoding step: planning, input tensors, sampling, text and events.

The model is replaced by one that returns prepared logits at once, or their most likely tokens where a step
asks its head for no more, so a step takes the time that it spends outside of the model. All of it runs on one
thread and is measured in processor time, which leaves out other load of the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time
from types import SimpleNamespace
from typing import Any

import torch

import parallelmind as pm
from benchmarks.decoding import MAIN_TOKENS, patched, prompts, shared_main
from benchmarks.harness import Bench
from benchmarks.text import tokenizer
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.sampler import Sampler
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.step import Step
from parallelmind.model import step_ops

_STEPS, _MAX_NEW_TOKENS = 30, 256


class _PreparedLogits:
    """Stands in for a model: calls return its logits or most likely tokens, attributes are the model's."""

    def __init__(self, model: Any, rows: int) -> None:
        self._model = model
        shape = (1, rows, model.config.vocab_size)
        self.logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)
        self.tokens = self.logits[0].float().argmax(dim=-1)

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        count, step = len(inputs["logits_to_keep"]), step_ops.running_step()
        if isinstance(step, Step) and step.head is not None:
            step.largest[:] = self.tokens[:count]
        return SimpleNamespace(logits=self.logits[:, :count])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _decoding_engine(samples: int, branches: int) -> pm.Engine:
    """An engine with decoding samples of one main and prompts of 24 tokens; each has produced a token."""
    config = EngineConfig(MAIN_TOKENS * 4 + samples * branches * (_MAX_NEW_TOKENS + 64))
    engine = pm.Engine(patched("isolated", "bfloat16"), tokenizer(), config)
    main, (text, *_) = shared_main(), prompts(1)
    settings: dict[str, Any] = {"max_new_tokens": _MAX_NEW_TOKENS, "ignore_eos": True}
    engine.submit(pm.Sample([], [text]), **settings | {"max_new_tokens": 1})
    while engine.busy:
        engine.step()
    assert isinstance(engine.runner, ModelRunner)
    engine.runner.model = _PreparedLogits(engine.runner.model, samples * branches)  # type: ignore[assignment]
    for _ in range(samples):
        engine.submit(pm.Sample(main, [text] * branches), **settings)
    while len(engine.step()) < samples * branches:
        pass
    return engine


def _host_ms(samples: int, branches: int) -> float:
    engine = _decoding_engine(samples, branches)
    return _median_ms(engine.step)


def _sampling_ms(rows: int) -> float:
    """The sampler's part of it. A CPU reads all logits for that; with a GPU the host does not."""
    logits = _PreparedLogits(patched("isolated", "bfloat16"), rows).logits[0]
    sampler, row = Sampler(), {"params": SamplingParams(), "seed": 0, "index": 0, "history": []}
    branches = [SimpleNamespace(**row, branch=index) for index in range(rows)]
    return _median_ms(lambda: sampler(logits, branches).read())


def _median_ms(work: Callable[[], object]) -> float:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 1e3 * median(_processor_seconds(work) for _ in range(_STEPS))
    finally:
        torch.set_num_threads(num_threads)


def _processor_seconds(work: Callable[[], object]) -> float:
    start = process_time()
    work()
    return process_time() - start


BENCHES = [
    Bench("decoding.host_ms_8", 0.7, "lower", "ms", partial(_host_ms, 1, 8)),
    Bench("decoding.host_ms_1024", 6, "lower", "ms", partial(_host_ms, 256, 4)),
    Bench("decoding.sampling_ms_8", None, "lower", "ms", partial(_sampling_ms, 8)),
    Bench("decoding.sampling_ms_1024", None, "lower", "ms", partial(_sampling_ms, 1024)),
]

"""A step on an accelerator launches few operators for each layer, and its inputs keep their addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import COLUMNAR, ISOLATED, tiny_engine
from flexing import flex_decoding, flex_on_cpu
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput

from benchmarks.operators import _LAYERS, LaunchCounter
from parallelmind.config import RopeConfig
from parallelmind.engine import flex_attention
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.evaluation.tiny_models import tiny_model, tiny_tokenizer
from parallelmind.model import step_ops
from parallelmind.model.patch import patch

KERNEL = torch.library.Library("flexstub", "DEF")
KERNEL.define("attend(Tensor query) -> (Tensor, Tensor)")
KERNEL.impl(
    "attend", lambda query: (query.clone(), query.sum(-1).float()), "CompositeExplicitAutograd"
)  # one launch


def stub(query: Tensor, *_: Any, return_aux: Any = None, **__: Any) -> Any:
    out, lse = torch.ops.flexstub.attend(query)
    return out if return_aux is None else (out, AuxOutput(lse=lse))


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex_attention, "flex_attention", stub)
    monkeypatch.setattr(step_ops, "attend", step_ops._attend)  # whose operators are counted then
    with flex_on_cpu(), flex_decoding():
        yield


def step_of(config: RopeConfig, layers: int) -> Callable[[], object]:
    model = tiny_model("llama", "sdpa", num_hidden_layers=layers)
    patch(model, config)
    engine = Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=256))
    engine.submit(Sample([5, 6, 7], [[8], [9, 10]]), max_new_tokens=9, ignore_eos=True)
    for _ in range(3):
        engine.step()
    return engine.step


@pytest.mark.parametrize(
    ("config", "limit"), [(COLUMNAR, 40), (ISOLATED, 50)], ids=["columnar", "isolated: merged"]
)
def test_operators_per_layer(config: RopeConfig, limit: int, stubbed: None) -> None:
    """The kernel counts as one. A compiler fuses what surrounds it, and a graph launches all at once."""
    counts = []
    for layers in _LAYERS:
        step = step_of(config, layers)
        with LaunchCounter(per_product=1) as counter:
            step()
        counts.append(counter.count)
    assert (counts[1] - counts[0]) / (_LAYERS[1] - _LAYERS[0]) <= limit


def test_buffers_and_pools_keep_their_addresses() -> None:
    """A captured graph reads and writes where the step was captured."""
    with flex_on_cpu(), flex_decoding():
        engine = tiny_engine(ISOLATED, cache_tokens=256)
        runner: Any = engine.runner
        addresses = set()
        for length in (1, 40, 90):
            engine.submit(Sample(list(range(3, 3 + length)), [[8]]), max_new_tokens=2, ignore_eos=True)
            while engine.busy:
                engine.step()
            addresses.add(
                tuple(pool.data_ptr() for pools in runner.cache.layer_pools.values() for pool in pools)
            )
        buffers = {bucket: own.columns.data_ptr() for bucket, own in runner._device_steps._buffers.items()}
        engine.submit(Sample([3], [[8]]), max_new_tokens=2, ignore_eos=True)
        while engine.busy:
            engine.step()
        assert buffers == {
            bucket: own.columns.data_ptr() for bucket, own in runner._device_steps._buffers.items()
        }
    assert len(addresses) == 1

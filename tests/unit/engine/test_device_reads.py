"""A step on an accelerator reads from it once, and mixes no tensors of different devices.

The meta device stands in for the accelerator: it computes shapes alone, and raises for operators that mix it
with the host. What is read from it is zero.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from families import variant
from flexing import flex_decoding, flex_on_cpu

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.evaluation.device_waits import count_reads, count_waits
from parallelmind.evaluation.tiny_models import tiny_tokenizer
from parallelmind.model import step_ops
from parallelmind.model.patch import patch

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 1},
    "log-probabilities": {"logprobs": 2, "repetition_penalty": 1.2, "logit_bias": {5: 1.0}},
}


@pytest.mark.parametrize("name", ["shared", "layer types", "windows beside full attention"])
@pytest.mark.parametrize("visibility", ["isolated", "columnar"])
@pytest.mark.parametrize(
    ("attention", "count"),
    [(nullcontext, count_reads), (flex_decoding, count_waits)],
    ids=["gathered", "flex"],
)
def test_a_step_reads_once(
    name: str, visibility: Any, attention: Any, count: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FlexAttention the host waits for no copy to the device either."""
    # On meta tensors torch would take the shape of an operator and not call it.
    monkeypatch.setattr(step_ops, "attend", step_ops._attend)
    with flex_on_cpu(), attention(), count() as reads:
        check_reads(name, visibility, reads)


def check_reads(name: str, visibility: Any, reads: list[str]) -> None:
    model = variant(name, "sdpa")
    patch(model, RopeConfig(visibility=visibility))
    engine = Engine(model.to("meta"), tiny_tokenizer(), EngineConfig(cache_tokens=1024))
    for settings in SETTINGS.values():
        for sample in (Sample(list(range(50, 90)), [[5, 6, 7], [8]]), Sample([], [[9, 10]])):
            engine.submit(sample, max_new_tokens=3, ignore_eos=True, **settings)
    while engine.busy:
        reads.clear()
        assert engine.step()
        assert reads == ["tolist"]

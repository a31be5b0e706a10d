"""Adapters by row in plain torch add to each row what peft adds with the row's adapter alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiny import tiny_llama

from parallelmind.engine.batch import single_token
from parallelmind.engine.device_lora import DeviceLora, is_possible, recorded_readers
from parallelmind.model import step_ops
from parallelmind.model.structure import causal_lm

ADAPTERS, ROWS, SAMPLED = ("b", "a", "base"), [0, 0, 1, 2, 1], [4, 3, 0]


def adapted_model() -> peft.PeftModel:
    """Adapters of two ranks; "b" has none on the head."""
    model: Any = tiny_llama()
    for name, rank, targets in (("a", 3, ["q_proj", "lm_head"]), ("b", 2, ["q_proj"])):
        settings = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=targets, init_lora_weights=False)
        if name == "a":
            model = peft.get_peft_model(model, settings, name)
        else:
            model.add_adapter(name, settings)
    return model.eval()


@pytest.mark.parametrize(("name", "tokens"), [("q_proj", range(len(ROWS))), ("lm_head", SAMPLED)])
@torch.no_grad()
def test_each_row_gets_its_own_adapter(name: str, tokens: Any) -> None:
    model, step = adapted_model(), SimpleNamespace(attends=False)
    layer = next(module for path, module in model.named_modules() if path.endswith(name))
    input, lora = torch.randn(1, len(tokens), 64), DeviceLora(model)
    given = replace(single_token(), adapters=ADAPTERS, adapter=np.array(ROWS))
    lora.begin(torch.from_numpy(lora.numbered(given).adapter), torch.tensor(SAMPLED))
    with lora.active(), step_ops.running(step):  # type: ignore[arg-type]
        added = layer(input)
    for row, token in enumerate(tokens):
        adapter = ADAPTERS[ROWS[token]]
        if adapter == "base":
            expected = layer.base_layer(input)[0, row]
        else:
            model.set_adapter(adapter)
            expected = layer(input)[0, row]
        assert torch.allclose(added[0, row], expected, atol=1e-5)


@torch.no_grad()
def test_a_model_has_them_if_the_adapted_layers_read_every_token_once() -> None:
    model = adapted_model()
    with recorded_readers(causal_lm(model)) as readers:
        model(input_ids=torch.tensor([[5, 6]]))
    assert is_possible(model, readers)
    assert not is_possible(model, readers - {causal_lm(model).lm_head.base_layer})

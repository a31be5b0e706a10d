"""Arrays as ids, numbers of NumPy as settings, a model in train mode, and a penalty that counts main."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines import ISOLATED, decode, run_to_end, tiny_engine, tokens_by_branch
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models as tiny
from parallelmind.model.patch import patch

MAIN, BRANCHES = [5, 6, 7, 8], [[9, 10], [11, 12]]


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple], ids=["numpy", "torch", "tuple"])
def test_ids_may_be_arrays_tensors_and_tuples(make: Any) -> None:
    engine, settings = tiny_engine(), {"max_new_tokens": 3}
    expected = decode(engine, Sample(MAIN, BRANCHES), reduce=[13], **settings)
    assert decode(engine, Sample(make(MAIN), make(BRANCHES)), reduce=make([13]), **settings) == expected
    without_main = decode(engine, Sample([], BRANCHES), **settings)
    assert decode(engine, Sample(make([]), [make(ids) for ids in BRANCHES]), **settings) == without_main


@pytest.mark.parametrize(
    "ids", [np.ones((40, 40), int), torch.ones(1, 3).long(), np.array(5), np.array([1.5]), torch.rand(2)]
)
def test_arrays_that_are_no_ids_are_refused_in_one_line(ids: Any) -> None:
    with pytest.raises(UserError, match="tokens=.*: give text, or a list of token ids") as error:
        tiny_engine().submit(Sample([], [ids]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [lambda value: np.array([value])[0], torch.tensor], ids=["numpy", "torch"])
def test_settings_may_be_numbers_of_numpy(number: Any) -> None:
    plain = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "min_p": 0.25, "seed": 7}
    plain |= {"repetition_penalty": 1.5, "ignore_eos": True, "logprobs": 2}
    params = SamplingParams(
        **{name: number(value) for name, value in plain.items()}, logit_bias={number(3): number(0.5)}
    )
    expected = SamplingParams(**plain, logit_bias={3: 0.5})
    if number is not torch.tensor:
        assert params == expected
    assert {name: type(getattr(params, name)) for name in plain} == {
        name: type(getattr(expected, name)) for name in plain
    }


def test_a_setting_that_is_no_truth_value_is_refused() -> None:
    with pytest.raises(UserError, match="ignore_eos='no': give True or False"):
        SamplingParams(ignore_eos="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["side by side", "a row for each branch"])
def test_a_model_in_train_mode_is_decoded_in_eval_mode_and_stays_in_train_mode(kind: str) -> None:
    if kind == "side by side":
        model = tiny_llama(attention_dropout=0.5)
        patch(model, ISOLATED)
    else:
        model = tiny.tiny_model("mamba2")
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    layer.register_forward_hook(lambda module, *_: seen.append(module.training))
    seen: list[bool] = []
    outputs = []
    for training in (False, True):
        model.train(training)
        model.lm_head.eval()  # the mode of each module is kept
        engine = Engine(model, tiny_tokenizer(), EngineConfig(512) if kind != "side by side" else None)
        outputs.append(decode(engine, Sample([5, 6], [[7], [8]]), max_new_tokens=4))
        assert (model.training, layer.training, model.lm_head.training) == (training, training, False)
    assert outputs[0] == outputs[1]
    assert not any(seen)


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_the_repetition_penalty_counts_main_as_transformers_counts_the_prompt(penalty: float) -> None:
    model = tiny_llama()
    patch(model, RopeConfig(rope_2d_ratio=0))
    engine = Engine(model, tiny_tokenizer(), EngineConfig(512))
    main, prompt = list(range(50, 250)), [20, 21]
    settings: dict[str, Any] = {"max_new_tokens": 12, "repetition_penalty": penalty}
    number = engine.submit(Sample(main, [prompt]), ignore_eos=True, **settings)
    ids = torch.tensor([main + prompt])
    expected = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, **settings
    )
    tokens = tokens_by_branch(run_to_end(engine))[number, 0]
    assert tokens == expected[0, ids.shape[1] :].tolist()

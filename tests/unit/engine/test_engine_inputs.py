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


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda: Sample(b"text", ["who"]), "tokens=b'text': give text, or a list of token ids"),
        (lambda: Sample("text", [b"who"]), "tokens=b'who': give text, or a list of token ids"),
        (lambda: Sample(5, ["who"]), "tokens=5: give text, or a list of token ids"),
        (lambda: Sample(np.array(5), ["who"]), r"tokens=array\(5\): give text, or a list"),
        (lambda: Sample({5, 6}, ["who"]), r"tokens=\{5, 6\}: give text, or a list"),
        (lambda: Sample([], [[True, False]]), "tokens=.*: .*truth values are not ids"),
        (lambda: Sample([], [torch.tensor([True])]), "tokens=.*: .*truth values are not ids"),
        (lambda: Sample("\ud83e", ["who"]), "text='.ud83e': holds half of a surrogate pair"),
        (lambda: Sample("", ["who \udd99"]), "text='who .udd99': holds half of a surrogate pair"),
        (lambda: Sample("text", {"who": "where"}), "branches=.*: give a list of texts, one per branch"),
        (lambda: Sample("text", {"who"}), "branches=.*: give a list of texts"),
        (lambda: Sample("text", 5), "branches=5: give a list of texts"),
        (lambda: Sample("text", None), "branches=None: give a list of texts"),
        (lambda: Sample("text", b"who"), "branches=b'who': give a list of texts"),
        (lambda: Sample("text", np.array(5)), r"branches=array\(5\): give a list of texts"),
        (lambda: Sample("text", (text for text in ["who"])), "branches=<generator.*: give a list of texts"),
    ],
)
def test_what_is_neither_text_nor_a_list_is_refused_in_one_line(sample: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny_engine().submit(sample())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_branch": [None]}, r"per_branch=\[None\]: give a list of dicts, one per branch"),
        ({"per_branch": {"seed": 1}}, "per_branch=.*: give a list of dicts"),
        ({"per_branch": 5}, "per_branch=5: give a list of dicts"),
        ({"per_branch": [[("seed", 1)]]}, "per_branch=.*: give a list of dicts"),
        ({"adapter": ["base"]}, "adapter=.*: not loaded; choose from base"),
        ({"reduce": b"who"}, "tokens=b'who': give text"),
        ({"temperature": np.array([[1], [2]])}, "temperature=array.*: give 0"),
        ({"logit_bias": torch.tensor([[1], [2]])}, "logit_bias=tensor.*: give a mapping"),
        ({"a\nb": 1}, "a b=1: unknown sampling setting"),
    ],
)
def test_settings_of_a_wrong_type_are_refused_in_one_line(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tiny_engine().submit(Sample("text", ["who"]), **settings)
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


@pytest.mark.parametrize("first", ["sdpa", "eager"])
def test_the_attention_of_a_model_may_be_set_between_steps(first: str) -> None:
    """Before, every step raised after a change to eager."""
    model = tiny_llama(attn_implementation=first)
    patch(model, ISOLATED)
    engine, sample = Engine(model, tiny_tokenizer(), EngineConfig(512)), Sample(MAIN, BRANCHES)
    expected = decode(engine, sample, max_new_tokens=6)
    number = engine.submit(sample, max_new_tokens=6)
    events = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        events += engine.step()
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert [tokens[number, branch] for branch in range(2)] == expected


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

"""What `generate` and `stream` take as a prompt, and the shape of what they return."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import parallelmind as pm
from parallelmind.engine.prompt import chat_ids
from parallelmind.model.patch import patch

CHAT = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model = tiny_llama()
    patch(model, pm.RopeConfig())
    return model, tiny_tokenizer()


def generated(loaded: tuple[Any, Any], prompt: Any, *args: Any, **settings: Any) -> Any:
    return pm.generate(*loaded, prompt, *args, **{"max_new_tokens": 6, **settings})


def test_a_text_and_token_ids_give_a_text(loaded: tuple[Any, Any]) -> None:
    text = generated(loaded, "the sky is")
    assert text == pm.generate_text(*loaded, "the sky is", max_new_tokens=6) != ""
    ids = loaded[1]("the sky is").input_ids
    for given in (ids, np.array(ids), torch.tensor(ids), tuple(ids)):
        assert generated(loaded, given) == text
    assert generated(loaded, torch.tensor([ids])) == [text]


def test_a_list_gives_a_list_whose_prompts_do_not_read_each_other(loaded: tuple[Any, Any]) -> None:
    samples = [pm.Sample("the sky", ["a", "b"]), pm.Sample("a dog", ["c"])]
    given = ["the sky is", *samples, CHAT]
    assert generated(loaded, given) == [generated(loaded, prompt) for prompt in given]
    assert generated(loaded, []) == []
    events = list(pm.stream(*loaded, given, max_new_tokens=2))
    assert {(event.sample, event.branch) for event in events} == {(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)}


def test_messages_are_rendered_with_the_header_of_the_answer(loaded: tuple[Any, Any]) -> None:
    ids = chat_ids(loaded[1], CHAT)
    assert ids == loaded[1].apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert generated(loaded, CHAT) == generated(loaded, ids)
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(pm.UserError, match="messages: the model has no chat template; give a text"):
        chat_ids(bare, CHAT)


def test_sampling_parameters_are_an_argument_that_keywords_override(loaded: tuple[Any, Any]) -> None:
    params = pm.SamplingParams(
        max_new_tokens=9, temperature=0.9, seed=3, stop=("zz",), logit_bias=((7, 1.0),)
    )
    expected = pm.generate(*loaded, "a", **params.settings())
    assert pm.generate(*loaded, "a", params) == expected
    assert pm.generate(*loaded, "a", sampling_params=params) == expected
    assert pm.generate(*loaded, "a", params, seed=4, max_new_tokens=9) != expected


def test_a_model_in_train_mode_with_checkpointing_generates_the_same(loaded: tuple[Any, Any]) -> None:
    model = tiny_llama(attention_dropout=0.5)
    patch(model, pm.RopeConfig())
    sample = pm.Sample("the sky", ["a", "b"])
    expected = pm.generate(model, loaded[1], sample, max_new_tokens=6)
    model.train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    assert pm.generate(model, loaded[1], sample, max_new_tokens=6) == expected
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "settings", "error"),
    [
        (3, {}, r"^prompt=3: give a text, pm.Sample"),
        ({"main": "x"}, {}, r"^prompt=\{'main': 'x'\}: give a text"),
        (["a", None], {}, r"^prompt=None: give a text"),
        (
            "a",
            {"max_tokens": 3},
            r"^max_tokens=3: .* \(did you mean max_new_tokens\?\)",
        ),
        ("a", {"do_sample": True}, r"^do_sample=True: .* \(did you mean temperature\?\)"),
        ("a", {"temprature": 1}, r"^temprature=1: .* \(did you mean temperature\?\)"),
        ("a", {"sampling_params": ["Who?"]}, r"^sampling_params=\['Who\?'\]: give pm.SamplingParams"),
        (["a", "b"], {"reduce": "c"}, r"^reduce='c': 2 prompts are given; write it into each"),
    ],
)
def test_a_wrong_guess_is_answered(
    loaded: tuple[Any, Any], prompt: Any, settings: dict[str, Any], error: str
) -> None:
    with pytest.raises(pm.UserError, match=error):
        generated(loaded, prompt, **settings)

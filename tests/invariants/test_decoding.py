"""A patched model decodes each branch as plain decoding does, with our engine and with transformers."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.generate import generate, generate_text, stream
from parallelmind.engine.request import Sample
from parallelmind.model.patch import patch

MAIN = [5, 6, 7]
BRANCHES = [[11, 12, 13, 14, 15, 16], [21], [31, 32, 33, 34], [41]]


def test_one_branch_equals_generate_of_transformers():
    model = tiny_llama()
    patch(model, RopeConfig())
    prompt = torch.tensor([BRANCHES[0]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    sample = Sample(branches=[BRANCHES[0]])
    tokens = [
        event.token for event in stream(model, tiny_tokenizer(), sample, max_new_tokens=12, ignore_eos=True)
    ]
    assert tokens == expected[0, len(BRANCHES[0]) :].tolist()


def test_isolated_branches_equal_each_prompt_alone():
    """With r = 0 and time positions, main and branch are decoded as one plain prompt."""
    model = tiny_llama()
    patch(model, RopeConfig(rope_2d_ratio=0, visibility="isolated", positions="time"))
    tokenizer = tiny_tokenizer()
    together = generate(model, tokenizer, Sample(main=MAIN, branches=BRANCHES), max_new_tokens=8)
    assert together == [
        generate_text(model, tokenizer, MAIN + branch, max_new_tokens=8) for branch in BRANCHES
    ]


def test_a_document_is_read_as_one_plain_prompt_with_its_question():
    """A branch of 0 new tokens is read by the reduce branch alone."""
    model = tiny_llama()
    patch(model, RopeConfig(rope_2d_ratio=0, visibility="isolated", positions="time"))
    document, question, settings = BRANCHES[0], BRANCHES[2], {"max_new_tokens": 8}
    texts = generate(
        model,
        tiny_tokenizer(),
        Sample(MAIN, [document]),
        per_branch=[{"max_new_tokens": 0}],
        reduce=question,
        **settings,
    )
    assert texts == ["", generate_text(model, tiny_tokenizer(), MAIN + document + question, **settings)]


def test_an_unpatched_model_continues_one_branch():
    plain, patched = tiny_llama(), tiny_llama()
    patch(patched, RopeConfig(rope_2d_ratio=0))
    sample = Sample(main="the passage", branches=["who lives"])
    texts = [generate(model, tiny_tokenizer(), sample, max_new_tokens=8) for model in (plain, patched)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("wrap", [False, True], ids=["patched", "peft"])
def test_transformers_generate_still_works(wrap):
    """Each prompt of a left-padded chat batch gets the same tokens alone, and from our engine."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.padding_side = "left"
    patch(model, RopeConfig())
    if wrap:
        torch.manual_seed(0)
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
        model = peft.get_peft_model(model, settings).eval()
    chats = [[{"role": "user", "content": text}] for text in ("who?", "where is the passage")]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for chat, row in zip(chats, together, strict=True):
        alone = tokenizer.apply_chat_template(
            [chat], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        prompt = alone["input_ids"][0].tolist()
        expected = model.generate(**alone, **options)[0, len(prompt) :].tolist()
        assert row.tolist()[: len(expected)] == expected
        assert [
            event.token for event in stream(model, tokenizer, Sample(branches=[prompt]), max_new_tokens=8)
        ] == expected

"""Conversations are rendered by the chat template, and the targets are exactly the answer."""

from __future__ import annotations

import random
from typing import Any

import pytest
from chat_checks import (
    chat_ids,
    check_conversation,
    random_conversation,
    target_texts,
    trained,
)
from chat_templates import CHAT_KINDS, chat_tokenizer
from converting import TOKENIZER, bad_reason, convert
from tiny import tiny_tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerBase

from parallelmind.config import ModelConfig
from parallelmind.data.convert.chat import ChatRenderer
from parallelmind.data.records import RecordError
from parallelmind.errors import UserError, UserNotice
from parallelmind.model.base_model import load_tokenizer

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))
CONVERSATION = [
    {**SYSTEM, "content": "Be brief."},
    {**USER, "content": "who lives in it"},
    {**ASSISTANT, "content": "the answer"},
    {**USER, "content": "où est Zoë 😀"},
    {**ASSISTANT, "content": " où: the passage 😀"},
]


ROLE_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def target_text(record: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a record's only run of targets in training, whose ids are those of its text."""
    tokens = trained(record, tokenizer)
    assert tokens.ids.tolist() == tokenizer(record["text"], add_special_tokens=False).input_ids
    (text,) = target_texts(tokens, tokenizer)
    return text


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_messages_are_rendered_and_only_the_last_answer_is_a_target() -> None:
    (record,) = convert([{"messages": CONVERSATION}])
    assert isinstance(record, dict)
    assert record["text"] == TOKENIZER.apply_chat_template(CONVERSATION, tokenize=False)
    assert record["text"].startswith("<s>system\nBe brief.</s>")
    assert target_text(record, TOKENIZER) == " où: the passage 😀</s>"


def test_each_turn_gives_a_record_that_ends_with_it() -> None:
    first, last = convert([{"messages": CONVERSATION}], each_turn=True)
    assert isinstance(first, dict)
    assert first["text"] == TOKENIZER.apply_chat_template(CONVERSATION[:3], tokenize=False)
    assert target_text(first, TOKENIZER) == "the answer</s>"
    assert [last] == convert([{"messages": CONVERSATION}])


def test_turn_after_the_last_answer_is_excluded() -> None:
    assert convert([{"messages": [*CONVERSATION, {**USER, "content": "bye"}]}]) == convert(
        [{"messages": CONVERSATION}]
    )


def test_sharegpt_is_the_same_conversation() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in CONVERSATION]
    assert convert([{"conversations": turns}]) == convert([{"messages": CONVERSATION}])
    assert convert([{"system": "Be brief.", "conversations": turns[1:]}]) == convert(
        [{"messages": CONVERSATION}]
    )


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "who "}, {"type": "text", "text": "lives in it"}]
    assert convert(
        [{"messages": [CONVERSATION[0], {**USER, "content": parts}, *CONVERSATION[2:]]}]
    ) == convert([{"messages": CONVERSATION}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "has no list of turns"),
        ([{**USER, "content": "who"}], "no assistant turn"),
        ([{**ASSISTANT, "content": "who"}], "no assistant turn"),
        ([CONVERSATION[1], {**ASSISTANT, "content": " "}], r"messages[1] is empty"),
        ([CONVERSATION[1], {**ASSISTANT, "content": None}], r"messages[1] is not text"),
        ([CONVERSATION[1], {**ASSISTANT, "content": "\ud800"}], "surrogate"),
        ([{"role": "narrator", "content": "x"}], "'narrator'"),
        ([{**USER, "content": [{"type": "image_url"}]}], "something other than text"),
        (["who"], r"messages[0] is not a JSON object"),
    ],
)
def test_reason_of_a_bad_conversation(messages: list[Any], reason: str) -> None:
    assert reason in bad_reason({"messages": messages})


@pytest.mark.filterwarnings("ignore:.*no special token after an answer:parallelmind.errors.UserNotice")
def test_token_across_the_boundary_is_not_a_target() -> None:
    tokenizer = with_template(ROLE_TEMPLATE)
    (record,) = ChatRenderer(tokenizer).records(
        [CONVERSATION[1], {**ASSISTANT, "content": "the answer"}], each_turn=False
    )
    assert "Ġthe" in tokenizer.get_vocab()
    assert target_text(record, tokenizer) == " answer\n"


@pytest.mark.filterwarnings("ignore:.*no special token after an answer:parallelmind.errors.UserNotice")
def test_white_space_outside_a_span_belongs_to_its_token() -> None:
    tokenizer = with_template(ROLE_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    (record,) = ChatRenderer(tokenizer).records(
        [CONVERSATION[1], {**ASSISTANT, "content": "the answer"}], each_turn=False
    )
    assert target_text(record, tokenizer) == " answer\n"


def test_rendered_text_gets_no_bos_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    (record,) = ChatRenderer(tokenizer).records(CONVERSATION)
    assert [record] == convert([{"messages": CONVERSATION}])
    assert trained(record, tokenizer).ids.tolist() == chat_ids(tokenizer, CONVERSATION)


@pytest.mark.parametrize("kind", CHAT_KINDS)
@pytest.mark.filterwarnings("ignore:.*begins an answer with:parallelmind.errors.UserNotice")
def test_trained_ids_are_those_of_the_chat_template(kind: str) -> None:
    rng = random.Random(kind)
    for number in range(8):
        reasoning = CHAT_KINDS[kind].reasons and number % 2 == 0
        check_conversation(kind, random_conversation(kind, rng, 1 + number % 3, reasoning), "last")


@pytest.mark.parametrize("kind", [kind for kind, chat in CHAT_KINDS.items() if chat.keeps_turns])
@pytest.mark.filterwarnings("ignore:.*begins an answer with:parallelmind.errors.UserNotice")
def test_all_turns_are_targets_of_one_record(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(4):
        messages = random_conversation(kind, rng, 4)
        messages[-3]["train"] = False
        check_conversation(kind, messages, "all")


def test_all_turns_need_a_template_that_renders_them_alike() -> None:
    conversation = random_conversation("qwen3", random.Random(0), 2)
    with pytest.raises(RecordError, match="renders differently once a turn follows it"):
        list(ChatRenderer(chat_tokenizer("qwen3")).records(conversation, all_turns=True))
    (record,) = convert([{"messages": CONVERSATION}], all_turns=True)
    assert target_texts(trained(record, TOKENIZER), TOKENIZER) == [
        "the answer</s>",
        " où: the passage 😀</s>",
    ]
    with pytest.raises(ValueError, match="give one of them"):
        convert([{"messages": CONVERSATION}], all_turns=True, each_turn=True)


def test_a_last_turn_may_end_with_another_token_than_earlier_ones() -> None:
    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
        "{{ '</s>' if loop.last and m.role == 'assistant' else '<pad>' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    tokenizer = with_template(template)
    (record,) = ChatRenderer(tokenizer).records(CONVERSATION, all_turns=True)
    assert target_texts(trained(record, tokenizer), tokenizer) == [
        "the answer",
        " où: the passage 😀</s>",
    ]


def test_white_space_after_the_end_token_is_a_target_only_without_an_end_token() -> None:
    tokenizer = with_template(ROLE_TEMPLATE)
    answer = {**ASSISTANT, "content": "in the passage"}
    with pytest.warns(UserNotice, match="writes no special token after an answer"):
        (record,) = ChatRenderer(tokenizer).records([CONVERSATION[1], answer])
    assert target_text(record, tokenizer).endswith("passage\n")


def test_generation_prompt_that_no_answer_begins_with_is_told() -> None:
    base = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    tokenizer = with_template(base + "{% if add_generation_prompt %}<s>assistant\n[think]{% endif %}")
    with pytest.warns(UserNotice, match=r"begins an answer with '\[think\]' in decoding"):
        (record,) = ChatRenderer(tokenizer).records(CONVERSATION)
    assert target_text(record, tokenizer) == " où: the passage 😀</s>"


def test_template_that_renders_the_context_differently_is_refused() -> None:
    chat = ChatRenderer(
        with_template("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    )
    with pytest.raises(RecordError, match="is rendered differently"):
        list(chat.records(CONVERSATION))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ messages[99].content.text }}", "no element 99"),
        ("{{ 1 // (messages | length - 4) }}{{ 1 // 0 }}", "by zero"),
        ("{{ range(1000000) | list }}", "Range too big"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_template_that_raises_makes_the_record_bad(template: str, reason: str) -> None:
    with pytest.raises(RecordError, match=f"refused by the chat template: .*{reason}"):
        list(ChatRenderer(with_template(template)).records(CONVERSATION))


def test_tokenizer_without_chat_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        ChatRenderer(tokenizer)


@pytest.mark.model
def test_targets_of_smollm2_are_exactly_the_answer() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    first, last = ChatRenderer(tokenizer).records(CONVERSATION, each_turn=True)
    assert target_text(first, tokenizer) == "the answer<|im_end|>"
    # " où" and the newline before it are separate tokens
    assert target_text(last, tokenizer) == " où: the passage 😀<|im_end|>"
    assert last["text"] == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)


def test_pairs_and_alpaca_are_rendered_as_chat() -> None:
    conversation = [{**USER, "content": "who\n\nin"}, {**ASSISTANT, "content": "it"}]
    expected = convert([{"messages": conversation}])
    assert convert([{"prompt": "who\n\nin", "response": "it"}], chat=True) == expected
    assert convert([{"question": "who\n\nin", "answer": "it"}], chat=True) == expected
    assert convert([{"instruction": "who", "input": "in", "output": "it"}], chat=True) == expected

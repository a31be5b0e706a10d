"""Conversations are rendered by the chat template, and the targets are exactly the answer."""

from __future__ import annotations

from typing import Any

import pytest
from converting import TOKENIZER, bad_reason, convert
from tiny import tiny_tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig, ModelConfig
from parallelmind.data.convert.chat import ChatRenderer
from parallelmind.data.records import RecordError, parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.errors import UserError
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


def target_text(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a record's targets in training, without the EOS that training adds."""
    (tokenised,) = tokenise([parse_value(record)], tokenizer, DataConfig(data_path="-"))
    assert tokenised.tokens is not None
    ids = tokenised.tokens.ids.tolist()
    offset = int(tokenised.tokens.targets.argmax())
    text = tokenizer.decode(ids[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text.removeprefix(tokenizer.bos_token or "") == record["text"].removeprefix(
        tokenizer.bos_token or ""
    )
    return tokenizer.decode(ids[offset:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_messages_are_rendered_and_only_the_last_answer_is_a_target() -> None:
    (record,) = convert([{"messages": CONVERSATION}])
    assert isinstance(record, dict)
    assert record["text"] == TOKENIZER.apply_chat_template(CONVERSATION, tokenize=False)
    assert record["text"].startswith("<s>system\nBe brief.</s>")
    assert target_text(record, TOKENIZER) == " où: the passage 😀</s>\n"


def test_each_turn_gives_a_record_that_ends_with_it() -> None:
    first, last = convert([{"messages": CONVERSATION}], each_turn=True)
    assert isinstance(first, dict)
    assert first["text"] == TOKENIZER.apply_chat_template(CONVERSATION[:3], tokenize=False)
    assert target_text(first, TOKENIZER) == "the answer</s>\n"
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


def test_token_across_the_boundary_is_not_a_target() -> None:
    tokenizer = with_template(ROLE_TEMPLATE)
    (record,) = ChatRenderer(tokenizer).records(
        [CONVERSATION[1], {**ASSISTANT, "content": "the answer"}], each_turn=False
    )
    assert "Ġthe" in tokenizer.get_vocab()
    assert target_text(record, tokenizer) == " answer\n"


def test_white_space_outside_a_span_belongs_to_its_token() -> None:
    tokenizer = with_template(ROLE_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    (record,) = ChatRenderer(tokenizer).records(
        [CONVERSATION[1], {**ASSISTANT, "content": "the answer"}], each_turn=False
    )
    assert target_text(record, tokenizer) == " answer\n"


def test_added_bos_is_counted() -> None:
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    conversation = [CONVERSATION[1], {**ASSISTANT, "content": "the answer"}]
    (without,) = ChatRenderer(tokenizer).records(conversation, each_turn=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    (record,) = ChatRenderer(tokenizer).records(conversation, each_turn=False)
    assert record["answer_offset"] == without["answer_offset"] + 1
    assert target_text(record, tokenizer) == "the answer"


def test_bos_of_the_template_is_not_counted_twice() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    (record,) = ChatRenderer(tokenizer).records(CONVERSATION, each_turn=False)
    assert [record] == convert([{"messages": CONVERSATION}])


def test_generation_prompt_may_be_longer_than_a_finished_turn() -> None:
    base = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    tokenizer = with_template(base + "{% if add_generation_prompt %}<s>assistant\n[think]{% endif %}")
    (record,) = ChatRenderer(tokenizer).records(CONVERSATION, each_turn=False)
    assert target_text(record, tokenizer) == " où: the passage 😀</s>"


def test_template_that_renders_the_context_differently_is_refused() -> None:
    chat = ChatRenderer(
        with_template("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    )
    with pytest.raises(RecordError, match="is rendered differently"):
        list(chat.records(CONVERSATION, each_turn=False))
    refusing = ChatRenderer(with_template("{{ raise_exception('no system') }}"))
    with pytest.raises(RecordError, match="refused by the chat template: no system"):
        list(refusing.records(CONVERSATION, each_turn=False))


def test_tokenizer_without_chat_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        ChatRenderer(tokenizer)


@pytest.mark.model
def test_targets_of_smollm2_are_exactly_the_answer() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    first, last = ChatRenderer(tokenizer).records(CONVERSATION, each_turn=True)
    assert target_text(first, tokenizer) == "the answer<|im_end|>\n"
    # " où" and the newline before it are separate tokens
    assert target_text(last, tokenizer) == " où: the passage 😀<|im_end|>\n"
    assert last["text"] == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)


def test_pairs_and_alpaca_are_rendered_as_chat() -> None:
    conversation = [{**USER, "content": "who\n\nin"}, {**ASSISTANT, "content": "it"}]
    expected = convert([{"messages": conversation}])
    assert convert([{"prompt": "who\n\nin", "response": "it"}], chat=True) == expected
    assert convert([{"question": "who\n\nin", "answer": "it"}], chat=True) == expected
    assert convert([{"instruction": "who", "input": "in", "output": "it"}], chat=True) == expected

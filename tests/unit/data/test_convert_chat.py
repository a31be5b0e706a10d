"""Conversations by the chat template: what is rendered, and that exactly the answer is learnt."""

from __future__ import annotations

from typing import Any

import pytest
from converting import TOKENIZER, bad_reason, made
from tiny import tiny_tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig, ModelConfig
from parallelmind.data.convert.chat import Chat
from parallelmind.data.records import RecordError, parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.errors import UserError
from parallelmind.model.base_model import load_tokenizer

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))
TALK = [
    {**SYSTEM, "content": "Be brief."},
    {**USER, "content": "who lives in it"},
    {**ASSISTANT, "content": "the answer"},
    {**USER, "content": "où est Zoë 😀"},
    {**ASSISTANT, "content": " où: the passage 😀"},
]


def target(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a record's targets in training, without the EOS that training adds."""
    (done,) = tokenise([parse_value(record)], tokenizer, DataConfig(data_path="-"))
    assert done.tokens is not None
    ids = done.tokens.ids.tolist()
    offset = int(done.tokens.answer_offsets[0])
    whole = tokenizer.decode(ids[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert whole.removeprefix(tokenizer.bos_token or "") == record["text"].removeprefix(
        tokenizer.bos_token or ""
    )
    return tokenizer.decode(ids[offset:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_messages_are_rendered_and_only_the_last_answer_is_learnt() -> None:
    (record,) = made([{"messages": TALK}])
    assert isinstance(record, dict)
    assert record["text"] == TOKENIZER.apply_chat_template(TALK, tokenize=False)
    assert record["text"].startswith("<s>system\nBe brief.</s>")
    assert target(record, TOKENIZER) == " où: the passage 😀</s>\n"


def test_each_turn_gives_a_record_that_ends_with_it() -> None:
    first, last = made([{"messages": TALK}], each_turn=True)
    assert isinstance(first, dict)
    assert first["text"] == TOKENIZER.apply_chat_template(TALK[:3], tokenize=False)
    assert target(first, TOKENIZER) == "the answer</s>\n"
    assert [last] == made([{"messages": TALK}])


def test_a_turn_after_the_last_answer_is_no_target() -> None:
    assert made([{"messages": [*TALK, {**USER, "content": "bye"}]}]) == made([{"messages": TALK}])


def test_sharegpt_is_the_same_conversation() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in TALK]
    assert made([{"conversations": turns}]) == made([{"messages": TALK}])
    assert made([{"system": "Be brief.", "conversations": turns[1:]}]) == made([{"messages": TALK}])


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "who "}, {"type": "text", "text": "lives in it"}]
    assert made([{"messages": [TALK[0], {**USER, "content": parts}, *TALK[2:]]}]) == made(
        [{"messages": TALK}]
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "has no list of turns"),
        ([{**USER, "content": "who"}], "no assistant turn"),
        ([{**ASSISTANT, "content": "who"}], "no assistant turn"),
        ([TALK[1], {**ASSISTANT, "content": " "}], r"messages[1] is empty"),
        ([TALK[1], {**ASSISTANT, "content": None}], r"messages[1] is not text"),
        ([TALK[1], {**ASSISTANT, "content": "\ud800"}], "surrogate"),
        ([{"role": "narrator", "content": "x"}], "'narrator'"),
        ([{**USER, "content": [{"type": "image_url"}]}], "something other than text"),
        (["who"], r"messages[0] is no JSON object"),
    ],
)
def test_bad_conversations(messages: list[Any], reason: str) -> None:
    assert reason in bad_reason({"messages": messages})


def test_a_token_across_the_border_is_no_target() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_template(template)
    (record,) = Chat(tokenizer).records([TALK[1], {**ASSISTANT, "content": "the answer"}], each_turn=False)
    assert "Ġthe" in tokenizer.get_vocab()
    assert target(record, tokenizer) == " answer\n"


def test_white_space_left_out_of_a_span_still_belongs_to_its_token() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = with_template(template)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    (record,) = Chat(tokenizer).records([TALK[1], {**ASSISTANT, "content": "the answer"}], each_turn=False)
    assert target(record, tokenizer) == " answer\n"


def test_an_added_bos_counts() -> None:
    tokenizer = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [TALK[1], {**ASSISTANT, "content": "the answer"}]
    (without,) = Chat(tokenizer).records(talk, each_turn=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    (record,) = Chat(tokenizer).records(talk, each_turn=False)
    assert record["answer_offset"] == without["answer_offset"] + 1
    assert target(record, tokenizer) == "the answer"


def test_a_bos_of_the_template_is_not_counted_twice() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    (record,) = Chat(tokenizer).records(TALK, each_turn=False)
    assert [record] == made([{"messages": TALK}])


def test_a_generation_prompt_that_opens_a_thought() -> None:
    base = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    tokenizer = with_template(base + "{% if add_generation_prompt %}<s>assistant\n[think]{% endif %}")
    (record,) = Chat(tokenizer).records(TALK, each_turn=False)
    assert target(record, tokenizer) == " où: the passage 😀</s>"


def test_a_template_that_changes_its_mind_is_refused() -> None:
    chat = Chat(with_template("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"))
    with pytest.raises(RecordError, match="in another way"):
        list(chat.records(TALK, each_turn=False))
    refusing = Chat(with_template("{{ raise_exception('no system') }}"))
    with pytest.raises(RecordError, match="refused by the chat template: no system"):
        list(refusing.records(TALK, each_turn=False))


def test_a_tokenizer_without_a_chat_template_is_a_users_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Chat(tokenizer)


@pytest.mark.model
def test_smollm2_learns_exactly_the_answer() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    first, last = Chat(tokenizer).records(TALK, each_turn=True)
    assert target(first, tokenizer) == "the answer<|im_end|>\n"
    # " où" and the line end before it are tokens apart
    assert target(last, tokenizer) == " où: the passage 😀<|im_end|>\n"
    assert last["text"] == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_pairs_and_alpaca_as_chat() -> None:
    talk = [{**USER, "content": "who\n\nin"}, {**ASSISTANT, "content": "it"}]
    expected = made([{"messages": talk}])
    assert made([{"prompt": "who\n\nin", "response": "it"}], chat=True) == expected
    assert made([{"question": "who\n\nin", "answer": "it"}], chat=True) == expected
    assert made([{"instruction": "who", "input": "in", "output": "it"}], chat=True) == expected

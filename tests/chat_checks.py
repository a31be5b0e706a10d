"""Random conversations, and the checks of a record that is converted from one."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any, Literal

from chat_templates import CHAT_KINDS, chat_tokenizer
from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.convert.chat import ChatRenderer
from parallelmind.data.record_parser import parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.layout import Tokens

_WORDS = ["rice", "Ada", "the answer", "é", "😀", "12", "a\nb", "likes", " two", "?", "«x»", "日本", "\tend"]


def random_conversation(kind: str, rng: random.Random, turns: int, reasoning: bool = False) -> list[Any]:
    """A conversation of `turns` questions and answers."""
    messages: list[dict[str, Any]] = []
    if CHAT_KINDS[kind].system and rng.random() < 0.5:
        messages.append({"role": "system", "content": _text(rng)})
    for _ in range(turns):
        messages += [{"role": "user", "content": _text(rng)}, {"role": "assistant", "content": _text(rng)}]
        if reasoning:
            messages[-1]["reasoning_content"] = _text(rng)
    return messages


def _text(rng: random.Random) -> str:
    text = rng.choice(["", " "]).join(rng.choices(_WORDS, k=rng.randint(1, 8)))
    return rng.choice(["", " ", "\n"]) + text + rng.choice(["", "", " "]) if text.strip() else "x"


def check_conversation(kind: str, messages: list[Any], turns: Literal["last", "each", "all"]) -> int:
    """Convert a conversation, and check every record; returns their number."""
    tokenizer = chat_tokenizer(kind)
    learnt = [turn["role"] == "assistant" and turn.get("train", True) for turn in messages]
    answers = [index for index, is_learnt in enumerate(learnt) if is_learnt]
    records = ChatRenderer(tokenizer).records(messages, turns == "each", None, turns == "all")
    expected = {"last": [answers[-1:]], "each": [[index] for index in answers], "all": [answers]}[turns]
    for record, targets in zip(records, expected, strict=True):
        _check_record(kind, messages[: targets[-1] + 1], targets, trained(record, tokenizer))
    return len(expected)


def _check_record(kind: str, messages: list[Any], targets: list[int], tokens: Tokens) -> None:
    """The ids are those of transformers, decoding begins alike, and the targets are the answers."""
    chat, tokenizer, ids = CHAT_KINDS[kind], chat_tokenizer(kind), tokens.ids.tolist()
    assert ids == chat_ids(tokenizer, messages)
    if not chat.reopens:
        for index in targets:
            prompt = chat_ids(tokenizer, messages[:index], add_generation_prompt=True)
            assert ids[: len(prompt)] == prompt
            assert tokens.targets[len(prompt)]
            assert not tokens.targets[len(prompt) - 1]
    answers = [chat.answer(turn["content"], turn.get("reasoning_content", "")) for turn in messages]
    final = len(messages) - 1
    assert target_texts(tokens, tokenizer) == [
        answers[index] + (chat.final if index == final else "") for index in targets
    ]


def trained(record: Any, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The record as training reads it."""
    (tokenised,) = tokenise(
        [parse_value(record)], tokenizer, DataConfig(data_path="-", max_branch_tokens=4096)
    )
    assert tokenised.tokens is not None
    return tokenised.tokens


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **settings: Any) -> list[int]:
    """The token ids of transformers."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)
    assert isinstance(ids, list)
    return ids


def target_texts(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every run of targets."""
    runs = groupby(zip(tokens.targets.tolist(), tokens.ids.tolist(), strict=True), key=lambda pair: pair[0])
    return [_decode([token for _, token in run], tokenizer) for is_target, run in runs if is_target]


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of ids inside a text: a decoder strips the space of the first word only."""
    before = tokenizer("x", add_special_tokens=False).input_ids
    return tokenizer.decode(before + ids, skip_special_tokens=False).removeprefix(tokenizer.decode(before))

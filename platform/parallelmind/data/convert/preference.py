"""Preference pairs: two answers to one prompt, which become two branches of one record."""

from __future__ import annotations

from typing import Any

import numpy as np

from parallelmind.data.convert.conversation import Message, system_text, turns_of, with_system
from parallelmind.data.convert.exchange import exchange_turns, parse_history
from parallelmind.data.convert.render_check import common_length
from parallelmind.data.convert.source_records import ParallelRecord
from parallelmind.data.records import RecordError
from parallelmind.layout import Tokens
from parallelmind.tree import Mask

ANSWER_KEYS = ("chosen", "rejected")  # branch 0 and branch 1
_NO_DIFFERENCE = "has no difference between chosen and rejected"


def preference_record(chosen: ParallelRecord, rejected: ParallelRecord) -> ParallelRecord:
    """One record from two records of the same prompt with their completions; branch 0 is the chosen one.

    The last word of the prompt stands in the branches: the first token of a branch is never a target. So does
    a prompt without spaces, which has different tokens if it is divided. Raises RecordError.
    """
    if chosen == rejected:
        raise RecordError(_NO_DIFFERENCE)
    prompt: str = chosen["prompt"]
    before, *last_word = prompt.rsplit(maxsplit=1)
    main = before if last_word else ""
    branches = [
        {"prompt": prompt[len(main) :], "completion": answer["completion"]} for answer in (chosen, rejected)
    ]
    return {"main": main, "branches": branches}


def rendered_preference(chosen: Tokens, rejected: Tokens) -> ParallelRecord:
    """One record from two rendered conversations, each a sample of one branch; branch 0 is the chosen one.

    Main is what both have in common before their first targets, without its last token: the first token of a
    branch is never a target.
    """
    samples = (chosen, rejected)
    shared = common_length(*(sample.ids.tolist() for sample in samples))
    length = min(shared, *(int(sample.targets.argmax()) for sample in samples)) - 1
    branches = [
        {"input_ids": sample.ids[length:].tolist(), "targets": _spans(sample.targets[length:])}
        for sample in samples
    ]
    return {"main": {"input_ids": chosen.ids[:length].tolist()}, "branches": branches}


def _spans(targets: Mask) -> list[list[int]]:
    """Half-open spans of the tokens that are targets."""
    edges = np.flatnonzero(np.diff(targets, prepend=False, append=False))
    spans: list[list[int]] = edges.reshape(-1, 2).tolist()
    return spans


def preference_turns(value: dict[str, Any], prompt: list[Message]) -> list[list[Message]]:
    """The conversation that ends with the chosen answer, and the one that ends with the rejected answer.

    An answer is a text, a turn, or turns, which may begin with those of the prompt. Only the turns in which
    the conversations differ are targets. Raises RecordError.
    """
    earlier = exchange_turns(parse_history(value.get("history")))
    conversations = [
        with_system([*earlier, *_conversation(prompt, value[key], key)], system_text(value))
        for key in ANSWER_KEYS
    ]
    shared = common_length(*conversations)
    if any(len(conversation) == shared for conversation in conversations):
        raise RecordError(_NO_DIFFERENCE)
    return [
        [{**turn, "train": turn["train"] and index >= shared} for index, turn in enumerate(conversation)]
        for conversation in conversations
    ]


def _conversation(prompt: list[Message], answer: Any, key: str) -> list[Message]:
    """The turns of the prompt and of an answer."""
    turns = turns_of(answer, key, "assistant")
    if not prompt or _contents(turns[: len(prompt)]) == _contents(prompt):
        return turns
    if turns[0]["role"] != "assistant":
        raise RecordError(f"{key} begins with another {turns[0]['role']} turn than the prompt")
    return [*prompt, *turns]


def _contents(turns: list[Message]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in turns]

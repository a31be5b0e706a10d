"""Several answers to one prompt (completions, or a preference pair), which become branches of one record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parallelmind.data.convert.conversation import Message, parse_json, system_text, turns_of, with_system
from parallelmind.data.convert.exchange import exchange_turns, parse_history
from parallelmind.data.convert.render_check import common_length
from parallelmind.data.convert.source_records import ParallelRecord
from parallelmind.data.records import RecordError
from parallelmind.layout import Tokens
from parallelmind.tree import Mask

PREFERENCE_KEYS = ("chosen", "rejected")  # branch 0 and branch 1
ANSWER_TEXT_KEYS = ("response", "completion", "answer", "text")  # of an object that is no turn
_NO_DIFFERENCE = "has no difference between chosen and rejected"


def split_prompt(prompt: str) -> tuple[str, str]:
    """A prompt as main and as the beginning of every branch, which is its last word.

    The first token of a branch is never a target. A prompt without spaces stands in the branches as a whole:
    it has different tokens if it is divided.
    """
    before, *last_word = prompt.rsplit(maxsplit=1)
    main = before if last_word else ""
    return main, prompt[len(main) :]


def record_of_texts(prompt: str, completions: Sequence[str]) -> ParallelRecord:
    """One record with a branch for every completion of the prompt."""
    main, beginning = split_prompt(prompt)
    branches = [{"prompt": beginning, "completion": completion} for completion in completions]
    return {"main": main, "branches": branches}


def record_of_conversations(samples: Sequence[Tokens]) -> ParallelRecord:
    """One record with a branch for every rendered conversation, each given as a sample of one branch.

    Main is what all have in common before their first targets, without its last token: the first token of a
    branch is never a target.
    """
    first = samples[0].ids.tolist()
    shared = min(common_length(first, sample.ids.tolist()) for sample in samples)
    length = min(shared, *(int(sample.targets.argmax()) for sample in samples)) - 1
    branches = [
        {"input_ids": sample.ids[length:].tolist(), "targets": _spans(sample.targets[length:])}
        for sample in samples
    ]
    return {"main": {"input_ids": first[:length]}, "branches": branches}


def _spans(targets: Mask) -> list[list[int]]:
    """Half-open spans of the tokens that are targets."""
    edges = np.flatnonzero(np.diff(targets, prepend=False, append=False))
    spans: list[list[int]] = edges.reshape(-1, 2).tolist()
    return spans


def parse_answers(value: dict[str, Any], key: str) -> dict[str, Any]:
    """The answers in the list under `key`, or in its JSON text, by their names. Raises RecordError."""
    answers = parse_json(value[key], key)
    if not isinstance(answers, list) or not answers:
        raise RecordError(f"{key} is not a list of answers")
    return {f"{key}[{index}]": _without_details(answer) for index, answer in enumerate(answers)}


def _without_details(answer: Any) -> Any:
    """The text of an answer that is given with its model or rating; any other answer as it is."""
    if not isinstance(answer, dict) or answer.keys() & {"role", "from"}:
        return answer
    return next((answer[key] for key in ANSWER_TEXT_KEYS if key in answer), answer)


def answer_turns(
    value: dict[str, Any], prompt: list[Message], answers: dict[str, Any]
) -> list[list[Message]]:
    """One conversation per answer. The targets are the answer's assistant turns. Raises RecordError.

    An answer is a text, a turn, or turns, which may begin with those of the prompt.
    """
    conversations = []
    for key, answer in answers.items():
        turns = _conversation(prompt, answer, key)
        if [turn["role"] for turn in turns[len(prompt) - 1 : len(prompt) + 1]] == ["assistant"] * 2:
            raise RecordError(f"{key} follows an assistant turn; remove that turn, or set source=messages")
        context = [{**turn, "train": False} for turn in turns[: len(prompt)]]
        conversations.append(_with_earlier(value, [*context, *turns[len(prompt) :]]))
    return conversations


def preference_turns(value: dict[str, Any], prompt: list[Message]) -> list[list[Message]]:
    """The conversation that ends with the chosen answer, and the one that ends with the rejected answer.

    An answer is as in `answer_turns`. Only the turns in which the conversations differ are targets. Raises
    RecordError.
    """
    conversations = [_with_earlier(value, _conversation(prompt, value[key], key)) for key in PREFERENCE_KEYS]
    shared = common_length(*conversations)
    if any(len(conversation) == shared for conversation in conversations):
        raise RecordError(_NO_DIFFERENCE)
    return [
        [{**turn, "train": turn["train"] and index >= shared} for index, turn in enumerate(conversation)]
        for conversation in conversations
    ]


def check_preference(chosen: str, rejected: str) -> None:
    """Raise RecordError if two completions are the same."""
    if chosen == rejected:
        raise RecordError(_NO_DIFFERENCE)


def _with_earlier(value: dict[str, Any], turns: list[Message]) -> list[Message]:
    """The turns after the history and the system text of a record."""
    return with_system([*exchange_turns(parse_history(value.get("history"))), *turns], system_text(value))


def _conversation(prompt: list[Message], answer: Any, key: str) -> list[Message]:
    """The turns of the prompt and of an answer."""
    turns = turns_of(answer, key, "assistant")
    if _begins_with(turns, prompt):
        return turns
    if turns[0]["role"] != "assistant":
        raise RecordError(f"{key} begins with another {turns[0]['role']} turn than the prompt")
    return [*prompt, *turns]


def turns_after(prompt: list[Message], answer: Any, key: str) -> list[Message]:
    """The turns of an answer without those of the prompt, with which it may begin. Raises RecordError."""
    turns = turns_of(answer, key, "assistant")
    if not _begins_with(turns, prompt):
        return turns
    if len(turns) == len(prompt):
        raise RecordError(f"{key} holds nothing but the prompt")
    return turns[len(prompt) :]


def _begins_with(turns: list[Message], prompt: list[Message]) -> bool:
    return _contents(turns[: len(prompt)]) == _contents(prompt)


def _contents(turns: list[Message]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in turns]

"""Settings of a conversion, and detection of the kind of source from a record's keys."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from parallelmind.config import FrozenConfig

Source = Literal["messages", "sharegpt", "alpaca", "pairs", "squad", "hotpotqa", "text"]

PAIR_KEYS = (("prompt", "response"), ("prompt", "completion"), ("prompt", "output"), ("question", "answer"))
_PARALLEL_KEYS = {"branches", "answer_offset", "input_ids"}  # keys of parallel JSONL only


class ConvertSettings(FrozenConfig):
    """How source records are read and converted."""

    source: Literal[Source, "auto"] = Field(
        "auto", description="kind of the source records; auto: detect it from the first record"
    )
    chat: bool = Field(
        False, description="alpaca, pairs: render them with the chat template, as user and assistant"
    )
    each_turn: bool = Field(
        False, description="messages, sharegpt: one record per assistant turn instead of the last turn only"
    )
    question_template: str = Field(
        " Question: {question}\nAnswer:", description="prompt of a branch that asks a question"
    )
    answer_template: str = Field(" {answer}", description="completion of a branch that asks a question")
    grouping: Literal["consecutive", "global"] = Field(
        "consecutive",
        description="squad, hotpotqa: group the consecutive questions of a passage, or all (held in memory)",
    )
    text_column: str = Field("text", min_length=1, description="text: column or key that holds the text")
    chunk_tokens: int = Field(512, ge=64, description="text: maximum tokens per chunk, BOS and EOS included")

    @model_validator(mode="after")
    def _check_templates(self) -> Self:
        for name in ("question", "answer"):
            template = getattr(self, f"{name}_template")
            if f"{{{name}}}" not in template:
                raise ValueError(f"{name}_template={template!r}: has no {{{name}}}; insert it")
        return self


def detect_source(value: Any, text_column: str) -> Source | None:
    """The kind of source that a record's keys indicate, or None. Parallel JSONL is not a source."""
    if not isinstance(value, dict) or value.keys() & _PARALLEL_KEYS:
        return None
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if value.keys() & {"paragraphs", "qas"}:
        return "squad"
    if {"context", "question"} <= value.keys():
        return "squad" if isinstance(value["context"], str) else "hotpotqa"
    if {"instruction", "output"} <= value.keys():
        return "alpaca"
    if any(set(pair) <= value.keys() for pair in PAIR_KEYS):
        return "pairs"
    return "text" if text_column in value else None

"""Settings of a conversion."""

from __future__ import annotations

import difflib
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from parallelmind.config import FrozenConfig
from parallelmind.data.convert.conversation import TURN_KEYS
from parallelmind.data.convert.kinds import KNOWN_KEYS, Shape, Source


class ConvertSettings(FrozenConfig):
    """How source records are read and converted."""

    source: Literal[Source, "auto"] = Field(
        "auto", description="kind of the source records; auto: detect it from the first record"
    )
    shape: Shape = Field(
        "flat",
        description="documents (squad, hotpotqa): documents, and the question that reads them; "
        "paths (messages, sharegpt, reasoning, alpaca, pairs): the tagged paths of the last answer are "
        "branches; flat: neither",
    )
    documents: int | None = Field(
        None,
        ge=1,
        description="shape=documents: number of documents per question, its own and others; null: all",
    )
    distractors: Literal["article", "all"] = Field(
        "article",
        description="shape=documents: where the others come from: the article, or the whole source, which is "
        "held in memory; all: the order is random",
    )
    encoding: str | None = Field(
        None,
        description="encoding of files without a byte order mark, such as cp1252 or gb18030; null: UTF-8",
    )
    columns: dict[str, str] = Field(
        {},
        description="source keys by the key that a kind expects: {prompt: q, completion: a}; "
        "role, content and other keys of turns are renamed in the turns",
    )
    chat: bool = Field(
        False,
        description="alpaca, pairs, reasoning, preference, completions: render them with the chat template, "
        "as user and assistant",
    )
    each_turn: bool = Field(
        False, description="messages, sharegpt: one record per assistant turn instead of the last turn only"
    )
    all_turns: bool = Field(
        False, description="messages, sharegpt: one record whose targets are all assistant turns"
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

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, name: str | None) -> str | None:
        try:
            "".encode(name or "utf-8")
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"encoding={name}: {error}; give a text encoding that Python knows") from error
        return name

    @model_validator(mode="after")
    def _check_templates(self) -> Self:
        for name in ("question", "answer"):
            template = getattr(self, f"{name}_template")
            if f"{{{name}}}" not in template:
                raise ValueError(f"{name}_template={template!r}: has no {{{name}}}; insert it")
        return self

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        if self.each_turn and self.all_turns:
            raise ValueError("each_turn=true all_turns=true: contradict each other; give one of them")
        for name in ("each_turn", "all_turns"):
            if self.shape == "paths" and getattr(self, name):
                raise ValueError(
                    f"shape=paths {name}=true: only the last answer becomes a tree; remove {name}"
                )
        return self

    @model_validator(mode="after")
    def _check_documents(self) -> Self:
        for name, value in (("documents", self.documents), ("distractors", self.distractors)):
            if value not in (None, "article") and self.shape != "documents":
                raise ValueError(f"{name}={value}: needs shape=documents")
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        expected = {*KNOWN_KEYS, *TURN_KEYS, self.text_column}
        for key in self.columns:
            if key not in expected:
                similar = difflib.get_close_matches(key, expected, n=1)
                hint = f" (did you mean {similar[0]}?)" if similar else ""
                raise ValueError(
                    f"columns.{key}={self.columns[key]}: no kind of source has the key {key}{hint}; "
                    "write columns={EXPECTED_KEY: SOURCE_KEY}"
                )
        return self

"""Fields of requests that hold answers to a grammar, by the names of OpenAI and of vLLM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

import parallelmind as pm
from parallelmind.engine.grammar import Grammar
from serving.protocol.fields import Items, Str, StrictRequest
from serving.protocol.strict_json import JsonObject

_ANY_OBJECT = {"type": "object"}


class NamedSchema(StrictRequest):
    name: Str
    description: Str | None = None
    schema_: JsonObject = Field(_ANY_OBJECT, alias="schema")
    strict: bool | None = None  # a schema is always followed


class ResponseFormat(StrictRequest):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammar(self) -> Grammar | None:
        """Raises UserError for a schema that is missing, or that the type does not use."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise pm.UserError(
                f'response_format: the type "{self.type}" and json_schema do not fit; give both, or neither'
            )
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else _ANY_OBJECT
        return Grammar.of({"json": schema}, "response_format")


class StructuredOutputs(StrictRequest):
    """One of several kinds of grammar, as vLLM's field of this name has them."""

    json_: Str | JsonObject | None = Field(None, alias="json")
    regex: Str | None = None
    choice: Items[Str] | None = None
    json_object: bool | None = None

    def grammar(self) -> Grammar:
        given = {"json": self.json_, "regex": self.regex, "choice": self.choice}
        if self.json_object:
            given = {**given, "json": _ANY_OBJECT} if self.json_ is None else {**given, "json_object": {}}
        return Grammar.of({k: v for k, v in given.items() if v is not None}, "structured_outputs")


class Structured(StrictRequest):
    """What an answer must follow: at most one of these fields. vLLM's earlier names begin with guided."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Str | JsonObject | None = None
    guided_regex: Str | None = None
    guided_choice: Items[Str] | None = None

    @property
    def grammar(self) -> Grammar | None:
        """Raises UserError for several grammars, and for one that exceeds the limits."""
        names = [name for name in Structured.model_fields if getattr(self, name) is not None]
        if len(names) > 1:
            raise pm.UserError(f"{names[0]}: {names[1]} is given too; give one of them")
        if self.response_format is not None:
            return self.response_format.grammar()
        if self.structured_outputs is not None:
            return self.structured_outputs.grammar()
        return next((self._guided(name) for name in names), None)

    def _guided(self, name: str) -> Grammar:
        return Grammar.of({name.removeprefix("guided_"): getattr(self, name)}, name)

"""Types of JSON fields that several request schemas share, and the strict base of all requests."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class StrictRequest(BaseModel):
    """Base of request schemas. Unknown fields are errors: a setting must not be ignored silently."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown_field(cls, value: Any) -> Any:
        """Report the first unknown field only, as `Items` does."""
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [name for name in value if name not in known] if isinstance(value, dict) else []
        if not unknown:
            return value
        return {name: value[name] for name in [*known, unknown[0]] if name in value}


def _refuse(value: Any) -> Any:
    """Null and an empty list mean that a field is not used."""
    if value is None or value == []:
        return None
    raise ValueError("is not supported; leave it out")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """OpenAI's four forms as a list of prompts: a text, texts, token ids, lists of token ids."""
    is_single = isinstance(value, str) or (
        isinstance(value, list) and value and all(type(item) is int for item in value)
    )
    return [value] if is_single else value


def _is_token_id(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit()


def _by_token_id(value: Any) -> Any:
    """Integer keys, which JSON does not have. Of several wrong entries the first is reported."""
    if not isinstance(value, dict):
        return value
    wrong = [key for key, bias in value.items() if not (_is_token_id(key) and type(bias) in (int, float))]
    return {int(key) if _is_token_id(key) else key: value[key] for key in wrong[:1] or value}


def require_encodable(value: str) -> str:
    """Refuse lone surrogates, which JSON can escape and UTF-8 cannot encode."""
    try:
        value.encode()  # in C; a loop over the characters would block the event loop
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate); send whole ones") from None
    return value


ItemT = TypeVar("ItemT")
Ignored = Any  # a field that does not change the answer
Unsupported = Annotated[None, BeforeValidator(_refuse, json_schema_input_type=None)]
Str = Annotated[str, AfterValidator(require_encodable)]
# Validation stops at the first wrong item: reporting every item of a long list takes seconds.
Items = Annotated[list[ItemT], Field(fail_fast=True)]
Text = Str | Items[int]
Texts = Annotated[Items[Str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Prompts = Annotated[Items[Text], BeforeValidator(_as_prompts, json_schema_input_type=Text | list[Text])]
LogitBias = Annotated[
    dict[int, float], BeforeValidator(_by_token_id, json_schema_input_type=dict[str, float])
]

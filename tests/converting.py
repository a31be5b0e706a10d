"""Source records to parallel JSONL with the tiny tokenizer, and every result checked to be a record."""

from __future__ import annotations

from typing import Any

from tiny import tiny_tokenizer

from parallelmind.data.convert.converter import Converter, ConvertSettings
from parallelmind.data.convert.items import Bad, Item
from parallelmind.data.records import parse_value

TOKENIZER = tiny_tokenizer()


def made(values: list[Any], **settings: Any) -> list[dict[str, Any] | Bad]:
    """What records become; all that is written must be records of parallel JSONL."""
    converter = Converter(ConvertSettings.model_validate(settings), lambda: TOKENIZER)
    results = list(converter.items(Item(str(index), value) for index, value in enumerate(values)))
    for result in results:
        if not isinstance(result, Bad):
            assert parse_value(result).unknown_keys == ()
    return results


def bad_reason(value: Any, **settings: Any) -> str:
    (result,) = made([value], **settings)
    assert isinstance(result, Bad)
    return result.reason

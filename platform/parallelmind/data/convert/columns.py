"""Rename the keys of source records to those that their kinds expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallelmind.data.convert.conversation import TURN_KEYS
from parallelmind.data.convert.source_records import BadRecord, SourceRecord


class Columns:
    """Renames keys. columns: the key in the source by the key that a kind expects.

    Keys of turns, such as content, are renamed in the turns. unseen: source keys that no record has had.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._of_turns = {key: source for key, source in columns.items() if key in TURN_KEYS}
        self._of_records = {key: source for key, source in columns.items() if key not in TURN_KEYS}
        self.unseen = set(columns.values())

    def rename(self, record: SourceRecord | BadRecord) -> SourceRecord | BadRecord:
        """The record with renamed keys. A bad record and a value without keys stay as they are."""
        if not self._of_records and not self._of_turns:
            return record
        if isinstance(record, BadRecord) or not isinstance(record.value, dict):
            return record
        value = self._renamed(record.value, self._of_records)
        return SourceRecord(record.location, {key: self._in_turns(item) for key, item in value.items()})

    def _in_turns(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [self._renamed(item, self._of_turns) if isinstance(item, dict) else item for item in value]

    def _renamed(self, value: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
        found = {key: value[source] for key, source in columns.items() if source in value}
        self.unseen -= {columns[key] for key in found}
        others = {
            f"{key} of the source" if key in found else key: item  # a name that no kind expects
            for key, item in value.items()
            if key not in columns.values()
        }
        return {**others, **found}

"""Samples for generation tests, and JSONL files of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "the answer to a question is in that passage who what where 你好".split()


def parse_rows(text: str) -> list[dict[str, Any]]:
    """The objects of JSONL text."""
    return [json.loads(line) for line in text.splitlines()]


def random_records(count: int) -> list[dict[str, Any]]:
    """Records with and without main, with one to three branches of very different lengths."""
    draw = random.Random(count)

    def words(minimum: int, maximum: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(minimum, maximum)))

    return [
        {"main": words(0, 9), "branches": [words(1, 30) for _ in range(draw.randint(1, 3))]}
        for _ in range(count)
    ]


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as JSONL."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")

"""Samples to continue, in files, and the rows that come of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "the answer to a question is in that passage who what where 你好".split()


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def records(count: int) -> list[dict]:
    """Samples with and without main, with one to three branches of very different lengths."""
    draw = random.Random(count)
    words = lambda least, most: " ".join(draw.choices(WORDS, k=draw.randint(least, most)))  # noqa: E731
    return [
        {"main": words(0, 9), "branches": [words(1, 30) for _ in range(draw.randint(1, 3))]}
        for _ in range(count)
    ]


def save(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text(
        "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8"
    )

"""Text for benchmarks: XQuAD if $XQUAD names a copy, generated passages otherwise."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from parallelmind.config import ModelConfig
from parallelmind.evaluation.facts import facts_records
from parallelmind.model.base_model import load_tokenizer

BRANCHES = 8


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the default base model."""
    return load_tokenizer(ModelConfig())


def passages(count: int) -> list[tuple[list[int], list[list[int]]]]:
    """Return `count` samples as token ids: a passage and eight questions about its article."""
    encode = tokenizer().encode
    return [
        (encode(main), [encode(question) for question in questions])
        for main, questions in _samples(count)[:count]
    ]


def texts() -> list[str]:
    """Return 240 passages as text."""
    return [main for main, _ in _samples(240)]


def _samples(count: int) -> list[tuple[str, list[str]]]:
    path = os.environ.get("XQUAD")
    return _xquad(Path(path)) if path else _generated(count)


def _xquad(path: Path) -> list[tuple[str, list[str]]]:
    samples = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        questions = [item["question"] for paragraph in article["paragraphs"] for item in paragraph["qas"]]
        for index, paragraph in enumerate(article["paragraphs"]):
            rotated = questions[index:] + questions[:index]
            samples.append((paragraph["context"], rotated[:BRANCHES]))
    return samples


def _generated(count: int) -> list[tuple[str, list[str]]]:
    return [
        (record["main"], [branch["prompt"] for branch in record["branches"]])
        for record in facts_records(count, seed=0)
    ]

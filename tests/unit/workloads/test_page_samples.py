"""Prompts of validation records: short, of text alone, and without the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

from workloads.train.page_samples import read_samples


def write(folder: Path, *records: Any) -> tuple[str]:
    path = folder / "held_out.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return (str(path),)


def asked(name: str) -> dict[str, str]:
    return {"prompt": f" Who is {name}?", "completion": " a secret"}


def test_samples_hold_prompts_and_no_answers(tmp_path: Path) -> None:
    files = write(tmp_path, {"main": "Facts.", "branches": [asked(name) for name in "abcdef"]})
    (sample,) = read_samples(files, 3, tiny_tokenizer())
    assert sample == {"main": "Facts.", "branches": [{"text": f" Who is {name}?"} for name in "abcd"]}


def test_a_tree_keeps_all_that_its_reduces_read(tmp_path: Path) -> None:
    documents = [{"text": f"Document {number}.", "targets": []} for number in range(6)]
    inner = {**asked("a"), "branches": [asked("b")], "reduce": asked("c")}
    files = write(tmp_path, {"branches": [*documents, inner], "reduce": asked("d")})
    (sample,) = read_samples(files, 3, tiny_tokenizer())
    assert sample["branches"][0] == {"text": "Document 0.", "max_tokens": 0}
    assert len(sample["branches"]) == 7
    assert sample["branches"][6] == {
        "text": " Who is a?",
        "branches": [{"text": " Who is b?"}],
        "reduce": {"text": " Who is c?"},
    }
    assert sample["reduce"] == {"text": " Who is d?"}
    assert "secret" not in json.dumps(sample)


def test_long_records_bad_lines_and_token_ids_are_left_out(tmp_path: Path) -> None:
    good = {"main": "Facts.", "branches": [asked("a")]}
    files = write(
        tmp_path,
        {"main": "x" * 5000, "branches": [asked("a")]},
        {"main": [5, 6], "branches": [asked("a")]},
        {"input_ids": [5, 6, 7]},
        {"broken": 1},
        *[good] * 5,
    )
    assert (
        read_samples(files, 2, tiny_tokenizer())
        == [{"main": "Facts.", "branches": [{"text": " Who is a?"}]}] * 2
    )
    assert read_samples(files, 0, tiny_tokenizer()) == []
    assert read_samples((), 3, tiny_tokenizer()) == []

"""Generated demo data: answers are in the passage, questions are distinct, and the seed determines all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallelmind.errors import UserError
from parallelmind.evaluation.facts import facts_records, write_facts


def test_every_answer_is_one_word_of_the_passage() -> None:
    for record in facts_records(50, seed=3):
        words = record["main"].replace(".", " ").split()
        assert 6 <= record["main"].count(".") <= 8
        for branch in record["branches"]:
            assert branch["prompt"].startswith(" Question: ")
            assert branch["prompt"].endswith("?\nAnswer:")
            assert branch["completion"].startswith(" ")
            assert words.count(branch["completion"].strip()) == 1


def test_questions_of_a_record_are_distinct() -> None:
    for record in facts_records(50, seed=0):
        prompts = [branch["prompt"] for branch in record["branches"]]
        assert len(set(prompts)) == len(prompts) == 8


def test_seed_determines_the_file(tmp_path: Path) -> None:
    write_facts(tmp_path / "new" / "a.jsonl", 20, seed=1)
    write_facts(tmp_path / "b.jsonl", 20, seed=1)
    write_facts(tmp_path / "c.jsonl", 20, seed=2)
    first, same_seed, other_seed = (
        (tmp_path / name).read_text() for name in ("new/a.jsonl", "b.jsonl", "c.jsonl")
    )
    assert first == same_seed
    passages = [{json.loads(line)["main"] for line in text.splitlines()} for text in (first, other_seed)]
    assert len(passages[0] | passages[1]) == 40


def test_record_does_not_depend_on_the_number_of_records() -> None:
    assert list(facts_records(3, seed=5)) == list(facts_records(9, seed=5))[:3]


@pytest.mark.parametrize(("samples", "branches", "message"), [(0, 8, "samples=0"), (1, 0, "branches=0")])
def test_counts_below_one_are_refused(samples: int, branches: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(facts_records(samples, 0, branches))

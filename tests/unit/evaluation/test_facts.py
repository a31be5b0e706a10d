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


def test_no_question_is_asked_twice_in_a_sample() -> None:
    for record in facts_records(50, seed=0):
        prompts = [branch["prompt"] for branch in record["branches"]]
        assert len(set(prompts)) == len(prompts) == 8


def test_one_seed_gives_one_file_and_another_seed_other_passages(tmp_path: Path) -> None:
    write_facts(tmp_path / "new" / "a.jsonl", 20, seed=1)
    write_facts(tmp_path / "b.jsonl", 20, seed=1)
    write_facts(tmp_path / "c.jsonl", 20, seed=2)
    first, second, other = ((tmp_path / name).read_text() for name in ("new/a.jsonl", "b.jsonl", "c.jsonl"))
    assert first == second
    passages = [{json.loads(line)["main"] for line in text.splitlines()} for text in (first, other)]
    assert len(passages[0] | passages[1]) == 40


def test_a_record_does_not_depend_on_how_many_follow() -> None:
    assert list(facts_records(3, seed=5)) == list(facts_records(9, seed=5))[:3]


@pytest.mark.parametrize(("samples", "branches", "told"), [(0, 8, "samples=0"), (1, 0, "branches=0")])
def test_counts_below_one_are_refused(samples: int, branches: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        list(facts_records(samples, 0, branches))

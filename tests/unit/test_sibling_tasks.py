"""The tasks of experiment 006: what a branch is asked for stands with a sibling; answers are right."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from experiments._results import read_table, updated, write_table
from experiments._sibling_tasks import TASKS, conflict_floor, records
from experiments._siblings import key_of

SAMPLES = 50


def branches(task: str, form: Any) -> list[list[tuple[str, str]]]:
    return [
        [(branch["prompt"], branch["completion"]) for branch in record["branches"]]
        for record in records(task, form, SAMPLES, seed=7)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_the_same_in_every_form(task: str) -> None:
    columnar, isolated, text = (branches(task, form) for form in ("columnar", "isolated", "text"))
    assert [[prompt for prompt, _ in one] for one in columnar] == [
        [prompt for prompt, _ in one] for one in isolated
    ]
    for sample, [(prompts, _)] in zip(columnar, text, strict=True):
        numbered = re.findall(r"^\d+\. (.*)$", prompts, re.MULTILINE)
        assert set(numbered) <= {prompt for prompt, _ in sample}
    assert branches(task, "columnar") == columnar != [*reversed(columnar)]


def test_a_fact_is_asked_of_another_branch() -> None:
    for sample in branches("relay", "columnar"):
        facts = dict(re.findall(r"(\w+) has the (\w+)\.", " ".join(prompt for prompt, _ in sample)))
        for prompt, answer in sample:
            asked = re.search(r"What does (\w+) have", prompt).group(1)  # type: ignore[union-attr]
            assert answer == f" {facts[asked]}"
            assert answer.strip() not in prompt


def test_two_hops_lead_to_another_branch() -> None:
    fact = re.compile(r"(\w+) has the (\w+) and sees (\w+)\. Whom does (\w+) see, and")
    for sample in branches("relay_twice", "columnar"):
        rows = [(*fact.match(prompt).groups(), answer) for prompt, answer in sample]  # type: ignore[union-attr]
        thing, sees = {row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows}
        for name, _, _, asked, answer in rows:
            assert answer == f" {sees[asked]} has the {thing[sees[asked]]}"
            assert name not in (asked, sees[asked])


def test_sums_are_those_of_the_list_up_to_the_part() -> None:
    line = re.compile(r"Part (\w): ([\d ]+) ; sums:")
    for sample in branches("add", "columnar"):
        parts = sorted((*line.match(prompt).groups(), answer) for prompt, answer in sample)  # type: ignore[union-attr]
        digits = [[int(digit) for digit in numbers.split()] for _, numbers, _ in parts]
        for count, (_, _, answer) in enumerate(parts, 1):
            assert int(answer.split()[-1]) == sum(sum(part) for part in digits[:count]) % 10
    for [(prompts, answers)] in branches("add", "text"):
        listed = [int(digit) for _, numbers in line.findall(prompts) for digit in numbers.split()]
        sums = [int(total) for total in re.sub(r"^\d+\.", "", answers, flags=re.MULTILINE).split()]
        assert sums[0] == listed[0]
        assert all(
            (right - left) % 10 == digit
            for (left, right), digit in zip(pairwise(sums), listed[1:], strict=True)
        )


def test_others_stop_two_words_after_it_is_found() -> None:
    for sample in branches("find", "columnar"):
        read = [answer.split() for _, answer in sample]
        found = min(len(words) for words in read if words[-1] == "found")
        for (prompt, _), words in zip(sample, read, strict=True):
            part = prompt.partition(": ")[2].partition(" ;")[0].split()
            assert words[:-1] == part[: len(words) - 1]
            assert len(words) <= found + 3
            if words[-1] == "none":
                assert words[:-1] == part
            elif words[-1] == "stop":
                assert len(words) == found + 2


def test_choices_differ_and_later_turns_wait() -> None:
    for sample in branches("choose", "columnar"):
        chosen = []
        for prompt, answer in sample:
            *waits, choice = answer.split()
            turn, things = re.match(r"Turn (\d): (.*) ;", prompt).groups()  # type: ignore[union-attr]
            assert waits == ["wait"] * 2 * int(turn)
            assert choice in things.split(", ")
            chosen.append(choice)
        assert len(set(chosen)) == len(chosen)


def test_isolated_branches_cannot_avoid_conflicts() -> None:
    assert 0.3 < conflict_floor(samples=500) < 0.4
    chosen = [
        Counter(answer.split()[-1] for _, answer in sample) for sample in branches("choose", "isolated")
    ]
    assert all(max(counts.values()) == 1 for counts in chosen)  # where all see each other, none conflicts


def test_a_measured_adapter_replaces_its_row_and_no_other(tmp_path: Path) -> None:
    def row(task: str, form: str, seed: int, right: float) -> dict[str, Any]:
        return {"task": task, "form": form, "seed": seed, "right": right}

    table = tmp_path / "table.csv"
    write_table(
        table, [row("relay", "text", 0, 0.5), row("relay", "text", 1, 0.25), row("add", "text", 0, 1.0)]
    )
    rows = updated(table, [row("relay", "text", 1, 0.75), row("relay", "columnar", 0, 1.0)], key_of)
    assert (
        read_table(table)
        == rows
        == [
            row("relay", "columnar", 0, 1.0),
            row("relay", "text", 0, 0.5),
            row("relay", "text", 1, 0.75),
            row("add", "text", 0, 1.0),
        ]
    )

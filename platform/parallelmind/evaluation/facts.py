"""Seeded demo data: passages of invented facts about people, with questions that only the passage answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from parallelmind.errors import UserError

_PEOPLE = (
    "Ada Amir Anna Boris Carla Chen Clara Daniel Diego Elena Emma Felix Fatima Grace Hana Hugo Ines "
    "Ivan Jonas Julia Kofi Laura Leo Lina Lucas Maria Max Mia Nadia Nina Noah Omar Oscar Paul Priya "
    "Rosa Sam Sara Sofia Theo Tom Vera Yara Zoe"
).split()


@dataclass(frozen=True, slots=True)
class _Relation:
    """A kind of fact: two statements of it, two questions for it, and its one-word values."""

    facts: tuple[str, str]
    questions: tuple[str, str]
    values: tuple[str, ...]


def _relation(facts: tuple[str, str], questions: tuple[str, str], values: str) -> _Relation:
    return _Relation(facts, questions, tuple(values.split()))


_RELATIONS = (
    _relation(
        (
            "For years {name} has lived in the city of {value}.",
            "The home of {name} is a small flat in the center of {value}.",
        ),
        ("Which city does {name} live in?", "In which city is the home of {name}?"),
        "Oslo Paris London Berlin Madrid Rome Vienna Prague Dublin Lisbon Athens Warsaw Cairo Lima "
        "Tokyo Delhi Boston Chicago",
    ),
    _relation(
        (
            "From Monday to Friday {name} works as a {value}.",
            "Since leaving school {name} has earned a living as a {value}.",
        ),
        ("What is the job of {name}?", "What does {name} work as?"),
        "baker farmer teacher doctor nurse pilot lawyer painter singer writer chef judge miner sailor "
        "plumber dentist barber",
    ),
    _relation(
        (
            "At home {name} takes care of a very old pet {value}.",
            "The pet that {name} keeps in the house is a {value}.",
        ),
        ("What kind of pet does {name} have?", "Which animal does {name} keep?"),
        "cat dog rabbit parrot horse goat turtle hamster snake lizard duck sheep mouse donkey",
    ),
    _relation(
        (
            "As everybody knows, the favorite color of {name} is {value}.",
            "All year {name} wears clothes that are {value}.",
        ),
        ("What color does {name} like to wear?", "Which color is the favorite of {name}?"),
        "red blue green yellow purple black white brown gray pink silver gold",
    ),
    _relation(
        (
            "For lunch {name} almost always likes to eat some {value}.",
            "On most days {name} never gets tired of eating {value}.",
        ),
        ("What does {name} like to eat?", "Which food does {name} eat for lunch?"),
        "rice pasta pizza soup bread cheese fish beans salad eggs noodles potatoes corn chicken",
    ),
    _relation(
        (
            "In the evening after dinner {name} plays the {value}.",
            "Slowly {name} is learning to play the {value}.",
        ),
        ("Which instrument does {name} play?", "What is {name} learning to play?"),
        "piano guitar violin flute drums trumpet cello harp banjo organ",
    ),
    _relation(
        (
            "On the door of {name} hangs the house number {value}.",
            "The house of {name} on our road has the number {value}.",
        ),
        ("What is the house number of {name}?", "Which number does the house of {name} have?"),
        " ".join(map(str, range(11, 100))),
    ),
)


def write_facts(path: str | Path, samples: int, seed: int, branches: int = 8) -> None:
    """Write `facts_records` as parallel JSONL. Creates the parent folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for record in facts_records(samples, seed, branches):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def facts_records(samples: int, seed: int, branches: int = 8) -> Iterator[dict[str, Any]]:
    """Generate records with a passage of 6 to 8 facts as `main` and one question with its answer per branch.

    Record i depends only on the seed and on i. Raises UserError for fewer than one sample or branch.
    """
    for field, value in (("samples", samples), ("branches", branches)):
        if value < 1:
            raise UserError(f"{field}={value}: must be at least 1; ask for one or more")
    for index in range(samples):
        yield _record(Random(f"{seed}:{index}"), branches)


def _record(random: Random, branches: int) -> dict[str, Any]:
    # Few people, and every value used once: answering needs both the person and the relation of a question.
    people = random.sample(_PEOPLE, random.randint(3, 5))
    pairs = random.sample(
        [(name, relation) for name in people for relation in _RELATIONS], random.randint(6, 8)
    )
    values = {relation: iter(random.sample(relation.values, len(people))) for relation in _RELATIONS}
    facts = [(name, relation, next(values[relation])) for name, relation in pairs]
    passage = " ".join(
        random.choice(relation.facts).format(name=name, value=value) for name, relation, value in facts
    )
    question_order = random.sample(facts, len(facts))
    first_wording = random.randint(0, 1)
    return {
        "main": passage,
        "branches": [_branch(question_order, index, first_wording) for index in range(branches)],
    }


def _branch(facts: list[tuple[str, _Relation, str]], index: int, first_wording: int) -> dict[str, str]:
    """Question number `index`: first each fact once, then each fact in the other wording, and so on."""
    repetition, fact_index = divmod(index, len(facts))
    name, relation, value = facts[fact_index]
    wording = (first_wording + fact_index + repetition) % 2
    question = relation.questions[wording].format(name=name)
    return {"prompt": f" Question: {question}\nAnswer:", "completion": f" {value}"}

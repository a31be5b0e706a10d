"""Tasks whose branches need each other: each prompt holds something that only a sibling's answer needs.

Names, things and numbers are drawn anew for every sample and do not follow the numbers of the branches, so
that nothing can be learnt by heart. Names and things are one token each in SmolLM2's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from random import Random
from typing import Any, Literal, NamedTuple, get_args

Form = Literal["columnar", "isolated", "text"]  # branches with and without a view of each other, and one text
FORMS: tuple[Form, ...] = get_args(Form)

_NAMES = (
    "Ada Amy Anna Ben Bill Bob Carl Clara Dan David Emma Eric Eva Finn Frank George Grace Henry Ian Jack "
    "Jane John Kate Ken Laura Leo Lucy Mark Mary Max Mike Nick Nina Oscar Paul Peter Ray Sam Sara Simon "
    "Sue Tom Tony Will"
).split()
_THINGS = (
    "lamp bridge apple boat chair clock coat cup desk door drum flag fork garden glass gold guitar hammer "
    "hat horse key kite knife ladder leaf letter map mask mirror moon mouse nail orange paper pen piano "
    "pipe plate ring river rock rope salt shell ship shoe silver snow spoon star stone sugar sword table "
    "tent ticket train tree wagon watch wheel window wood wool"
).split()
_BRANCHES = 4
_LIST, _HOLDERS = 24, 2  # things in a branch's part of a list; parts that hold what is looked for
_DIGITS = 2  # of a branch's part of a sum
_CHOICES, _POOL = 3, 6  # things that a branch chooses from, of those of the sample


class Branch(NamedTuple):
    """What a branch is given, and what it is to answer."""

    prompt: str
    answer: str


def relay(random: Random, form: Form) -> list[Branch]:
    """Each branch holds a fact and is asked for a sibling's."""
    names, things = random.sample(_NAMES, _BRANCHES), random.sample(_THINGS, _BRANCHES)
    asked = _others(random, _BRANCHES)
    return [
        Branch(f"{name} has the {thing}. What does {names[other]} have? The", f" {things[other]}")
        for name, thing, other in zip(names, things, asked, strict=True)
    ]


def relay_twice(random: Random, form: Form) -> list[Branch]:
    """The question names a sibling, whose fact names the sibling that has the thing asked for."""
    names, things = random.sample(_NAMES, _BRANCHES), random.sample(_THINGS, _BRANCHES)
    order = random.sample(range(_BRANCHES), _BRANCHES)
    sees = dict(zip(order, order[1:] + order[:1], strict=True))  # a circle
    asked = [
        random.choice([other for other in sees if own not in (other, sees[other])])
        for own in range(_BRANCHES)
    ]
    return [
        Branch(
            f"{names[own]} has the {things[own]} and sees {names[sees[own]]}. "
            f"Whom does {names[other]} see, and what has that one?",
            f" {names[sees[other]]} has the {things[sees[other]]}",
        )
        for own, other in enumerate(asked)
    ]


def add(random: Random, form: Form) -> list[Branch]:
    """The last digits of all sums of a list's beginnings: of the own part, then with the parts before it.

    Each step doubles the number of parts in a branch's sum (Hillis and Steele, 1986). In one text
    the sums continue from part to part.
    """
    parts = [[random.randrange(10) for _ in range(_DIGITS)] for _ in range(_BRANCHES)]
    own = [[total % 10 for total in accumulate(part)] for part in parts]
    answers, sums, distance = [[*line] for line in own], [line[-1] for line in own], 1
    if form == "text":
        before = [0, *accumulate(sums)]
        answers = [[(total + start) % 10 for total in line] for line, start in zip(own, before, strict=False)]
    while form != "text" and distance < _BRANCHES:
        sums = [
            (total + (sums[part - distance] if part >= distance else 0)) % 10
            for part, total in enumerate(sums)
        ]
        distance *= 2
        for line, total in zip(answers, sums, strict=True):
            line.append(total)
    branches = [
        Branch(f"Part {'ABCD'[part]}: {_numbers(digits)} ; sums:", f" {_numbers(answer)}")
        for part, (digits, answer) in enumerate(zip(parts, answers, strict=True))
    ]
    return branches if form == "text" else random.sample(branches, _BRANCHES)


def find(random: Random, form: Form) -> list[Branch]:
    """Each branch reads its part of a list until it finds a thing; the others stop when they see it found.

    Two parts hold it. The next token of a sibling attends to the token "found" and predicts the end.
    """
    thing, *words = random.sample(_THINGS, 1 + _LIST)
    parts = [random.sample(words, _LIST) for _ in range(_BRANCHES)]
    for part in random.sample(parts, _HOLDERS):
        part[random.randrange(_LIST)] = thing
    first = min(part.index(thing) for part in parts if thing in part)
    holders = [number for number, part in enumerate(parts) if thing in part]
    return [
        Branch(
            f"Find the {thing}: {' '.join(part)} ; read:",
            _read(part, thing, first if form == "columnar" else None),
        )
        for number, part in enumerate(parts)
        if form != "text" or number <= holders[0]  # one text reads part after part
    ]


def _read(part: Sequence[str], thing: str, first: int | None) -> str:
    """What a branch reads. first: the index at which a sibling finds the thing, if it sees siblings."""
    last = len(part) if first is None else min(first + 3, len(part))
    if thing in part[:last]:
        return "".join(f" {word}" for word in part[: part.index(thing) + 1]) + " found"
    return "".join(f" {word}" for word in part[:last]) + (" none" if last == len(part) else " stop")


def choose(random: Random, form: Form) -> list[Branch]:
    """Each branch chooses the first of its things that no branch before it has chosen.

    A branch waits two tokens for each turn before its own: a choice is seen by the token after it.
    """
    while True:
        pool = random.sample(_THINGS, _POOL)
        sets = [random.sample(pool, _CHOICES) for _ in range(_BRANCHES)]
        chosen = list[str]()
        for things in sets:
            chosen += [thing for thing in things if thing not in chosen][:1]
        if len(chosen) == _BRANCHES:
            break
    branches = [
        Branch(
            f"Turn {turn}: {', '.join(things)} ; choose:",
            " wait" * (0 if form == "text" else 2 * turn) + f" {one}",
        )
        for turn, (things, one) in enumerate(zip(sets, chosen, strict=True))
    ]
    return branches if form == "text" else random.sample(branches, _BRANCHES)


def conflict_floor(samples: int = 2000, seed: int = 1) -> float:
    """Share of conflicts of isolated branches that follow a convention, over samples of `choose`.

    A branch knows its turn and its own things. Every thing belongs to one turn, and a branch chooses a thing
    of its own turn if it has one, else of the next turn. Choosing at random gives 42%.
    """
    conflicts = 0
    for number in range(samples):
        branches = choose(Random(f"choose {seed} {number}"), "isolated")
        chosen = [_by_convention(branch.prompt) for branch in branches]
        conflicts += sum(chosen.count(thing) > 1 for thing in chosen)
    return conflicts / (samples * _BRANCHES)


def _by_convention(prompt: str) -> str:
    """The thing that a branch chooses by its turn alone."""
    turn, things = int(prompt[5]), prompt[prompt.index(":") + 2 : prompt.index(" ;")].split(", ")
    return min(things, key=lambda thing: (_THINGS.index(thing) - turn) % _BRANCHES)


def _others(random: Random, count: int) -> list[int]:
    """For every number another one."""
    return [random.choice([other for other in range(count) if other != own]) for own in range(count)]


def _numbers(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


TASKS: dict[str, Callable[[Random, Form], list[Branch]]] = {
    task.__name__: task for task in (relay, relay_twice, add, find, choose)
}


def data_path(task: str, form: Form) -> str:
    """The training data of a task in a form."""
    return f"runs/data/siblings.{task}.{form}.jsonl"


def records(task: str, form: Form, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Samples of a task in the project's format. The samples of a seed are the same in every form."""
    for number in range(count):
        branches = TASKS[task](Random(f"{task} {seed} {number}"), form)
        yield _as_text(branches) if form == "text" else _as_branches(branches)


def _as_branches(branches: Sequence[Branch]) -> dict[str, Any]:
    return {"branches": [{"prompt": prompt, "completion": answer} for prompt, answer in branches]}


def _as_text(branches: Sequence[Branch]) -> dict[str, Any]:
    """One text: what the branches are given, then their answers."""
    prompts = "\n".join(f"{number}. {branch.prompt}" for number, branch in enumerate(branches, 1))
    answers = "".join(f"\n{number}.{branch.answer}" for number, branch in enumerate(branches, 1))
    return {"branches": [{"prompt": prompts + "\nAnswers:", "completion": answers}]}

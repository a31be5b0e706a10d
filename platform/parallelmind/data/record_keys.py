"""The keys of a record of parallel JSONL: which may stand together, and which are misspelt."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parallelmind.data.records import RecordError

_TREE_KEYS = frozenset({"branches", "reduce"})
_KEYS = _TREE_KEYS | {
    *(
        "main",
        "documents",
        "text",
        "input_ids",
        "answer_offset",
        "targets",
        "rendered",
        "prompt",
        "completion",
    )
}
_TYPO = 0.8  # similarity of a misspelt key to the key that is meant, if the record is incomplete without it
_TYPO_OF_OPTIONAL = 0.88  # stricter, so that `domain` is not a misspelt `main`
_NEVER_MISSPELT = frozenset({"targets", "references"})  # `target` and `reference` are usual metadata columns


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write a text: the keys that it needs, and the keys that may stand beside them."""

    needed: frozenset[str]
    optional: frozenset[str] = frozenset()


_TEXT_FORMS = (
    Form(frozenset({"prompt", "completion"}), frozenset({"references"})),
    Form(frozenset({"text"}), frozenset({"answer_offset", "targets", "rendered"})),
    Form(frozenset({"input_ids"}), frozenset({"answer_offset", "targets"})),
)
SEGMENT_FORMS = tuple(Form(form.needed, form.optional | _TREE_KEYS) for form in _TEXT_FORMS)
RECORD_FORMS = (
    Form(frozenset({"branches"}), frozenset({"main", "reduce"})),
    Form(frozenset({"documents", "reduce"}), frozenset({"main", "branches"})),
    *(Form(form.needed, form.optional | {"main"}) for form in _TEXT_FORMS),
)
MAIN_FORMS = (Form(frozenset({"text"})), Form(frozenset({"input_ids"})))


def check_keys(value: dict[str, Any], where: str, forms: Sequence[Form]) -> tuple[str, ...]:
    """The keys that have no meaning here.

    forms: the ways to write the text; the first one that `value` has a key of counts. Raises RecordError for
    a misspelt key, and for a key with a meaning elsewhere whose content would be left out here.
    """
    form = next((form for form in forms if form.needed & value.keys()), None)
    meant = form.needed | form.optional if form else frozenset[str]()
    unknown = tuple(key for key in value if key not in meant)
    if not unknown:
        return ()
    needed = form.needed if form else frozenset[str]().union(*(form.needed for form in forms))
    # Without branches there is nothing to reduce, so that a similar key is metadata.
    never = _NEVER_MISSPELT if "branches" in value else _NEVER_MISSPELT | {"reduce"}
    _check_spelling(unknown, where, needed.difference(value), (meant - needed - never).difference(value))
    if form and (unused := _KEYS.intersection(unknown)):
        key, beside = min(unused), " and ".join(sorted(form.needed & value.keys()))
        raise RecordError(
            f"{where} has {key} beside {beside}, and {key} would not be used; remove one of them"
        )
    return tuple(key for key in unknown if key not in _KEYS)


def _check_spelling(
    unknown: Iterable[str], where: str, needed: frozenset[str], optional: frozenset[str]
) -> None:
    """Raise RecordError if a key resembles a key that the record lacks.

    A key that resembles a key of the record is metadata: `texts` beside `text`, `prompt_id` beside `prompt`.
    """
    for key in unknown:
        if key not in _KEYS and (
            meant := _similar(key, needed, _TYPO) or _similar(key, optional, _TYPO_OF_OPTIONAL)
        ):
            place = "" if where == "record" else f"{where} "
            raise RecordError(f"{place}has the key {key!r} (did you mean {meant}?)")


@functools.lru_cache(maxsize=1024)
def _similar(key: str, keys: frozenset[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(key.lower(), sorted(keys), 1, cutoff)), None)

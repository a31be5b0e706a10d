"""Exact match and F1 of short answers as in SQuAD; Chinese, Japanese and Korean count by character."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from parallelmind.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Kana, Hangul and ideographs, including those beyond the Basic Multilingual Plane.
_CJK = (
    "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_PUNCTUATION = frozenset(string.punctuation)
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def normalise_answer(text: str) -> str:
    """Lower-case the text; remove punctuation, English articles and extra whitespace."""
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals one of the normalised references, else 0.0.

    Raises UserError if `references` is empty or a string.
    """
    predicted = _tokens(prediction)
    return float(any(predicted == _tokens(reference) for reference in _check_references(references)))


def f1(prediction: str, references: Sequence[str]) -> float:
    """Token overlap with the closest reference, from 0.0 to 1.0.

    Raises UserError if `references` is empty or a string.
    """
    predicted = _tokens(prediction)
    return max(_f1(predicted, _tokens(reference)) for reference in _check_references(references))


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:  # SQuAD: an empty answer matches only an empty one
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(normalise_answer(text))


def _check_references(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise UserError(f"references={references!r}: needs at least one answer; give a list of texts")
    return references


def _is_punctuation(character: str) -> bool:
    """Whether the character is ASCII punctuation, its full-width form, or Unicode punctuation.

    Unicode classifies some of ASCII's punctuation as symbols, such as ~ and +.
    """
    if unicodedata.normalize("NFKC", character) in _PUNCTUATION:
        return True
    return unicodedata.category(character).startswith("P")

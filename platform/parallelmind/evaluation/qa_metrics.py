"""Exact match and F1 of short answers, as SQuAD defines them; Chinese, Japanese and Korean text counts by
character.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from parallelmind.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Kana, Hangul and ideographs, those beyond the first 65,536 characters too.
_CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_PUNCTUATION = frozenset(string.punctuation)
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and surplus whitespace."""
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the references after normalisation, else 0.0."""
    found = _tokens(prediction)
    return float(any(found == _tokens(reference) for reference in _checked(references)))


def f1(prediction: str, references: Sequence[str]) -> float:
    """Token overlap with the closest reference, 0.0 to 1.0."""
    found = _tokens(prediction)
    return max(_f1(found, _tokens(reference)) for reference in _checked(references))


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:  # SQuAD: an empty answer matches an empty one only
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(normalise_answer(text))


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise UserError(f"references={references!r}: needs at least one answer; give a list of texts")
    return references


def _is_punctuation(character: str) -> bool:
    """ASCII's punctuation, in its full width too (which makes ～ and ＋ symbols by category), and all of
    Unicode's.
    """
    return unicodedata.normalize("NFKC", character) in _PUNCTUATION or unicodedata.category(
        character
    ).startswith("P")

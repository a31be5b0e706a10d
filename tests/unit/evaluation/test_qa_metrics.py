"""Exact match and F1: SQuAD's normalisation, several references, and text without spaces."""

from __future__ import annotations

import pytest

from parallelmind.errors import UserError
from parallelmind.evaluation.qa_metrics import exact_match, f1, normalise_answer


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("“Oslo”", "oslo"),
        ("théâtre", "théâtre"),
    ],
)
def test_normalisation_follows_squad(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


def test_exact_match_accepts_any_reference() -> None:
    assert exact_match(" the Oslo.", ["Bergen", "oslo"]) == 1.0
    assert exact_match("Oslo fjord", ["Oslo"]) == 0.0


def test_f1_is_the_token_overlap_with_the_closest_reference() -> None:
    assert f1("blue whale", ["blue whale"]) == 1.0
    assert f1("a big blue whale", ["Paris", "the blue whale"]) == pytest.approx(2 * 2 / (3 + 2))
    assert f1("red", ["blue"]) == 0.0
    assert f1("no no", ["no"]) == pytest.approx(2 / 3)


def test_cjk_text_counts_by_character() -> None:
    assert f1("北京大学", ["北京"]) == pytest.approx(2 * 2 / (4 + 2))
    assert exact_match("北京。", ["北 京"]) == 1.0
    assert f1("1998年", ["1998 年"]) == 1.0
    assert f1("NBA总决赛", ["总决赛"]) == pytest.approx(2 * 3 / (4 + 3))
    assert f1("𠮷野家", ["𠮷家"]) == pytest.approx(2 * 2 / (3 + 2))  # beyond the Basic Multilingual Plane
    assert f1("東京タワー", ["東京"]) == pytest.approx(2 * 2 / (5 + 2))
    assert f1("佐々木", ["木"]) == pytest.approx(2 * 1 / (3 + 1))


@pytest.mark.parametrize(
    "text", ["（约）１９００～２０００年", "《约》，１９００＋２０００年。", "约 １９００２０００ 年"]
)
def test_full_width_punctuation_is_removed(text: str) -> None:
    assert exact_match(text, ["约１９００２０００年"]) == 1.0


def test_empty_answer_matches_only_an_empty_reference() -> None:
    assert f1("the", [""]) == 1.0
    assert f1("", ["Oslo"]) == 0.0


@pytest.mark.parametrize("references", [[], "Oslo"])
def test_references_must_be_a_non_empty_list(references: list[str] | str) -> None:
    with pytest.raises(UserError, match="references"):
        exact_match("Oslo", references)

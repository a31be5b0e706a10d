"""The pairs that a ratio selects, and the coordinate of each."""

import pytest

from parallelmind.model.rope2d import BRANCH, FLAT, TIME, pair_axes, selected_pairs


@pytest.mark.parametrize(
    ("pairs", "ratio", "where", "expected"),
    [
        (8, 0.0, "low", []),
        (8, 0.01, "low", [7]),
        (8, 0.25, "low", [6, 7]),
        (8, 0.25, "high", [0, 1]),
        (8, 0.25, "mid", [3, 4]),
        (8, 0.25, "spread", [3, 7]),
        (8, 1.0, "low", [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 1.0, "mid", [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 1.0, "spread", [0, 1, 2, 3, 4, 5, 6, 7]),
        (10, 0.3, "spread", [2, 5, 9]),
        (1, 0.1, "low", [0]),
    ],
)
def test_selected_pairs(pairs, ratio, where, expected):
    assert selected_pairs(pairs, ratio, where).tolist() == expected


def test_selected_pairs_alternate_branch_first():
    assert pair_axes(6, 0.5, "low", "alone").tolist() == [FLAT, FLAT, FLAT, BRANCH, TIME, BRANCH]
    assert pair_axes(6, 0.5, "mid", "alone").tolist() == [FLAT, BRANCH, TIME, BRANCH, FLAT, FLAT]


def test_added_branches_drive_all_selected_pairs():
    assert pair_axes(6, 0.5, "high", "added").tolist() == [BRANCH, BRANCH, BRANCH, FLAT, FLAT, FLAT]

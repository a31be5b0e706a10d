"""Figures of the docs: every figure can be drawn, from the log's losses and a sample with targets."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from parallelmind.evaluation.tiny_models import tiny_tokenizer
from tools.figures import FOLDER, LOG, draw, losses_of_log, sample, tree_sample

FIGURES = ("layout", "masks", "tree", "pairs", "tax")


def test_every_figure_is_drawn(tmp_path):
    drawn = draw(tmp_path / "figures", tiny_tokenizer())
    assert [path.name for path in drawn] == [f"{name}.png" for name in FIGURES]
    assert {path.name for path in FOLDER.glob("*.png")} == {path.name for path in drawn}
    for path in drawn:
        assert imread(path).std() > 0.05  # not blank


def test_losses_come_from_the_log():
    losses = losses_of_log(LOG.read_text(encoding="utf-8"))
    assert losses["published, ratio 1"][32] == 3.597
    assert losses["high pairs by branch + time, penalty 3"] == pytest.approx(
        {1: 1.923, 2: 1.918, 4: 1.921, 8: 1.931, 16: 1.941, 32: 1.962}
    )


def test_sample_targets_are_the_answers():
    tokens = sample(lambda text, first: [len(word) for word in text.split()])
    assert tokens.lengths.tolist() == [5, 5, 4, 3]
    assert tokens.targets.tolist() == [*[False] * 9, True, *[False] * 3, True, False, True, True]


def test_offers_of_the_tree_are_read_only():
    tokens = tree_sample(lambda text, first: [len(word) for word in text.split()])
    targets = [own.any() for own in np.split(tokens.targets, np.cumsum(tokens.lengths)[:-1])]
    assert targets == [False, True, False, False, True, True, True]

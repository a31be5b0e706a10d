"""What the patch adds to an adapter is trained, and an interrupted run resumes with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from looping import Recorder, assert_same_weights, config, run

from parallelmind.model import branch_embedding, penalty


@pytest.mark.parametrize(
    ("setting", "name", "start", "count", "least"),
    [
        ({"sibling_penalty": "learned"}, penalty.NAME, penalty.START, 2, 0.001),
        ({"branch_embeddings": 1}, branch_embedding.NAME, 0.0, 1, 0.0),
    ],
    ids=["penalties", "embeddings"],
)
def test_an_interrupted_run_resumes_with_them(
    setting: dict[str, Any], name: str, start: float, count: int, least: float, tmp_path: Path
) -> None:
    settings = config(**setting, learning_rate=1e-3)
    undisturbed = run(settings, tmp_path / "undisturbed")
    own = [weight for key, weight in undisturbed.weights.items() if name in key]
    assert len(own) == count
    for weight in own:
        assert ((weight - start).abs() > least).all()
    run(settings, tmp_path / "interrupted", Recorder(stop_at=3))
    resumed = run(settings, tmp_path / "interrupted")
    assert min(resumed.hooks.metrics) == 4
    assert_same_weights(resumed.weights, undisturbed.weights)

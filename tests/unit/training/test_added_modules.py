"""What the patch adds to an adapter is trained, and an interrupted run resumes with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from looping import Recorder, assert_same_weights, config, run

from parallelmind.model import branch_embedding, penalty


@pytest.mark.parametrize(
    ("setting", "name", "start"),
    [
        ({"sibling_penalty": "learned"}, penalty.NAME, penalty.START),
        ({"branch_embeddings": 4}, branch_embedding.NAME, 0.0),
    ],
    ids=["penalties", "embeddings"],
)
def test_an_interrupted_run_resumes_with_them(
    setting: dict[str, Any], name: str, start: float, tmp_path: Path
) -> None:
    settings = config(**setting, learning_rate=1e-3)
    undisturbed = run(settings, tmp_path / "undisturbed")
    own = [weight for key, weight in undisturbed.weights.items() if name in key]
    assert own
    for weight in own:
        assert (weight[0] != start).all()
        assert (weight[0] - start).abs().max() > 0.001
    run(settings, tmp_path / "interrupted", Recorder(stop_at=3))
    resumed = run(settings, tmp_path / "interrupted")
    assert min(resumed.hooks.metrics) == 4
    assert_same_weights(resumed.weights, undisturbed.weights)

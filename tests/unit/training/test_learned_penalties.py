"""A run that learns penalties: they change, and an interrupted run resumes with the same bits."""

from __future__ import annotations

from pathlib import Path

from looping import Recorder, assert_same_weights, config, run

from parallelmind.model.penalty import NAME, START


def test_an_interrupted_run_goes_on_with_its_penalties(tmp_path: Path) -> None:
    settings = config(sibling_penalty="learned", learning_rate=1e-3)
    undisturbed = run(settings, tmp_path / "undisturbed")
    penalties = {name: weight for name, weight in undisturbed.weights.items() if NAME in name}
    assert len(penalties) == 2
    for weight in penalties.values():
        assert ((weight - START).abs() > 0.001).all()
    run(settings, tmp_path / "interrupted", Recorder(stop_at=3))
    resumed = run(settings, tmp_path / "interrupted")
    assert min(resumed.hooks.metrics) == 4
    assert_same_weights(resumed.weights, undisturbed.weights)

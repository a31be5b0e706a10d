"""Vectorised coordinates, labels and masks compared with the token-by-token reference of the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Bench, ratio
from benchmarks.text import passages
from parallelmind.config import RopeConfig
from parallelmind.layout import Layout, Tokens, arrange
from parallelmind.model.mask import AttentionBias, Placement
from parallelmind.tree import relations

_SAMPLES = 12


def _reference() -> Any:
    """Load `reference_sample` of tests/reference.py, which is not a package."""
    path = Path(__file__).resolve().parent.parent / "tests" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference_sample


def vectorised(main: list[int], branches: list[list[int]], config: RopeConfig) -> tuple[Layout, torch.Tensor]:
    """Return the layout of one sample and its mask `[1, 1, tokens, tokens]`; -inf: not visible."""
    layout = arrange(Tokens.of(main, branches, [1] * len(branches)), config)
    arrays = (layout.time, layout.segment, relations(layout.tree))
    placement = Placement(*(torch.from_numpy(array)[None] for array in arrays))
    return layout, AttentionBias(placement, config.visibility).whole()


def layout_speedup() -> float:
    """Time of the reference over time of the vectorised code. Asserts that the results are equal."""
    config, reference = RopeConfig(), _reference()
    samples = passages(_SAMPLES)
    for main, branches in samples:
        layout, mask = vectorised(main, branches, config)
        expected = reference(main, branches, [1] * len(branches), config)
        assert np.array_equal(layout.ids, expected["id"])
        assert np.array_equal(layout.labels, expected["label"])
        assert np.array_equal(
            np.stack([layout.branch, layout.time], -1), np.stack([expected["branch"], expected["time"]], -1)
        )
        assert np.array_equal(mask[0, 0].numpy() > -np.inf, expected["visible"])

    def slow() -> None:
        for main, branches in samples:
            reference(main, branches, [1] * len(branches), config)

    def fast() -> None:
        for main, branches in samples:
            vectorised(main, branches, config)

    return ratio(slow, fast, repeats=3)


BENCHES = [Bench("data.layout_vs_reference", 20, "higher", "ratio", layout_speedup)]

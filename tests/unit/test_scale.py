"""The simulation of `experiments/005_scale.py` against closed-form results."""

from __future__ import annotations

import csv
import importlib
from typing import Any

import numpy as np
import pytest

scale: Any = importlib.import_module("experiments.005_scale")

PART = {"compute": 1.0, "dispatch": 0.1, "layout": 0.02, "all-reduce": 0.05, "checkpoints": 0.01}
EQUAL_SIZES = np.ones(21)
COST = {
    "tokens": 16384, "padding_share": 0.0, "places": [1.0] * 21, "seen_per_token": 500.0,
    "bytes_per_token": 4.0, "arrow_bytes_per_token": 4.0, "survey_s_per_byte": 3e-8,
    "tokenise_s_per_token": 2e-6, "layout_s_per_token": 5e-8, "dispatch_s": 0.002,
    "dispatch_s_per_layer": 0.002, "checkpoint_s_per_byte": 1e-9, "report_s": 0.1, "task_s": 0.003,
    "batch_server_s_per_batch": 1e-3, "batch_server_s_per_token": 1.5e-7,
}  # fmt: skip


def test_without_randomness_a_step_takes_its_parts_or_the_batch_servers_time() -> None:
    for workers in (1, 2, 16):
        own_s, source_s = sum(PART.values()) - PART["dispatch"], 0.3
        assert scale.simulate(workers, PART, 0.0, EQUAL_SIZES, 0.0, 0) == pytest.approx(own_s)
        expected = pytest.approx(max(own_s, workers * source_s))
        assert scale.simulate(workers, PART, source_s, EQUAL_SIZES, 0.0, 0) == expected


@pytest.mark.parametrize("workers", [1, 8, 256])
def test_a_step_takes_as_long_as_its_slowest_worker(workers: int) -> None:
    part = {**PART, "layout": 0.0, "all-reduce": 0.0, "checkpoints": 0.0}
    step_s = scale.simulate(workers, part, 0.0, EQUAL_SIZES, 0.2, 0, steps=4000)
    assert step_s == pytest.approx(scale.expected_max(workers, 0.2), rel=0.02)


def test_expected_maximum_of_two_draws() -> None:
    """E max = 2 exp(s^2 / 2) Phi(s / sqrt 2)."""
    assert scale.expected_max(1, 0.2) == pytest.approx(np.exp(0.02), rel=1e-3)
    assert scale.expected_max(2, 0.2) == pytest.approx(2 * np.exp(0.02) * 0.55623, rel=1e-3)


def test_a_step_takes_as_long_as_its_largest_batch() -> None:
    places = np.linspace(0.5, 1.5, 21)  # uniform: the expected maximum of n draws is at n / (n + 1)
    step_s = scale.simulate(9, {**PART, "dispatch": 0.0}, 0.0, places, 0.0, 0, steps=4000)
    assert step_s == pytest.approx(0.5 + 0.9 + 0.08, rel=0.01)


def test_queued_batches_hide_a_slow_step_but_not_a_slow_batch_server() -> None:
    jittered = scale.simulate(4, PART, 0.0, EQUAL_SIZES, 0.3, 0, steps=2000)
    for source in (0.2, 0.5):
        step_s = scale.simulate(4, PART, source, EQUAL_SIZES, 0.3, 0, steps=2000)
        assert max(jittered, 4 * source) * 0.999 <= step_s <= max(jittered, 4 * source) * 1.03


def test_ring_all_reduce_time() -> None:
    assert scale.ring(1, 1e6, 1.0, 1e6) == 0
    assert scale.ring(2, 1e6, 0.0, 1e6) == pytest.approx(1)
    assert scale.ring(256, 1e6, 0.0, 1e6) == pytest.approx(2 * 255 / 256)
    assert scale.ring(5, 0, 1.0, 1e6) == 8


def test_shapes_have_the_sizes_in_their_names() -> None:
    for name, size in (("135M", 134.5e6), ("0.5B", 494e6), ("1.5B", 1544e6)):
        shape = scale.SHAPES[name]  # tied embeddings
        frozen = (shape.flops(16, 0.0) - 6 * shape.trained(16)) / 4
        assert frozen == pytest.approx(size, rel=0.01)
    assert scale.SHAPES["135M"].trained(16) == 4_884_480


def test_a_row_names_the_limiting_part() -> None:
    given = scale.Inputs(sigma=0.0)
    one, many = (scale.row("0.5B", n, "infiniband", given, COST) for n in (1, 256))
    assert (one["limit"], many["limit"]) == ("compute", "batch server")
    assert many["tokens_per_s"] < 256 * one["tokens_per_s"]
    batch = (
        COST["batch_server_s_per_batch"] / 16384
        + COST["batch_server_s_per_token"]
        + 4 / 2**26 * COST["task_s"]
    )  # type: ignore[operator]
    assert many["tokens_per_s"] == pytest.approx(1 / batch, rel=1e-3)
    assert scale.row("7B", 256, "ethernet", given, COST)["all-reduce_ms"] > 50


def test_task_planning_limits_the_survey_on_many_nodes() -> None:
    hours = scale.survey_hours(32, scale.Inputs(), COST)
    assert hours["tasks"] == pytest.approx(10e12 / 2**26 * 0.003 / 3600)
    assert hours["tasks"] > hours["cores"]


def test_the_recorded_table_is_complete() -> None:
    with (scale.RESULTS / "005_scale.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(scale.SHAPES) * len(scale.WORKERS)
    assert {row["fabric"] for row in rows} == {"infiniband", "ethernet"}

"""A decoding step launches few operators for each layer."""

from __future__ import annotations

from functools import partial

from benchmarks.operators import engine_step, hugging_face_step, per_layer


def test_the_baseline_is_what_hugging_face_launches() -> None:
    assert per_layer(hugging_face_step) == 36


def test_isolated_branches_launch_no_more_operators_than_hugging_face() -> None:
    assert per_layer(engine_step) <= 36


def test_adapters_by_row_launch_few_more() -> None:
    step = partial(engine_step, with_adapter=True)
    assert per_layer(engine_step) < per_layer(step, per_product=2) <= 60

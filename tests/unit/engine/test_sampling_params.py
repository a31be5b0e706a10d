"""Checks of sampling settings."""

from __future__ import annotations

import dataclasses
import math

import pytest

from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", True),
        ("max_new_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", math.nan),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("stop", ""),
        ("stop", "text"),
        ("stop", ("end", "")),
        ("stop", (1,)),
        ("stop", ["end"] * 17),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("logit_bias", None),
        ("logit_bias", [1, 2]),
        ("logit_bias", (1, 2)),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: None}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
def test_a_bad_value_is_named_with_its_field(field, value):
    with pytest.raises(UserError, match=rf"^{field}=.*: give ") as error:
        SamplingParams(**{field: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("field", ["temperature", "stop", "seed", "logit_bias"])
def test_a_long_value_is_cut_short(field):
    with pytest.raises(UserError, match=f"^{field}='xxx") as error:
        SamplingParams(**{field: "x" * 1_000_000})
    assert len(str(error.value)) < 200


def test_a_long_stop_text_is_described_by_its_length():
    with pytest.raises(UserError, match=r"^stop=.*1000000 characters.*at most 1000 ") as error:
        SamplingParams(stop=["end", "x" * 1_000_000])
    assert len(str(error.value)) < 200
    assert SamplingParams(stop=["x" * 1000] * 16).stop == ("x" * 1000,) * 16


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="temprature=1: unknown"):
        SamplingParams.of({"temprature": 1})
    with pytest.raises(UserError) as error:
        SamplingParams.of({"x" * 1_000_000: "x" * 1_000_000})
    assert len(str(error.value)) < 400


def test_settings_are_immutable_and_can_be_replaced():
    params = SamplingParams(logit_bias={7: 1, 3: -2.5}, stop=["a"])
    assert params.logit_bias == ((3, -2.5), (7, 1.0))
    assert hash(params) == hash(dataclasses.replace(params))
    assert dataclasses.replace(params, seed=1).logit_bias == params.logit_bias

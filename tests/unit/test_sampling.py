"""Settings are checked, and a seeded branch draws the same whoever decodes beside it."""

from __future__ import annotations

import math

import pytest
import torch

from parallelmind.decoding.sampling import SamplingParams, generators, processors, sample
from parallelmind.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("max_new_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
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
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(UserError, match=rf"^{field}=.*: give "):
        SamplingParams(**{field: value})


def test_an_unknown_setting_is_named():
    with pytest.raises(UserError, match="temprature=1: unknown"):
        SamplingParams.of({"temprature": 1})


def test_processors_that_change_nothing_are_left_out():
    assert not processors(SamplingParams(top_k=5, top_p=0.5, min_p=0.1))  # greedy
    names = [type(part).__name__ for part in processors(SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1))]
    assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"]


def draw(params: SamplingParams, logits: torch.Tensor, branches: list[int], steps: int) -> list[list[int]]:
    pool = generators(params, max(branches) + 1)
    rows = [sample(logits[branches], processors(params), None, [pool[branch] for branch in branches]) for _ in range(steps)]
    return torch.stack(rows, dim=1).tolist()


def test_a_seeded_branch_draws_the_same_beside_anyone():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.5, seed=7)
    together = draw(params, logits, [0, 1, 2], 20)
    assert draw(params, logits, [2], 20) == [together[2]]
    assert together[0] != draw(SamplingParams(temperature=1.5, seed=8), logits, [0], 20)[0]
    same = torch.zeros(2, 50)
    assert len({tuple(row) for row in draw(params, same, [0, 1], 20)}) == 2, "two branches must not draw alike"


def test_without_a_seed_the_global_generator_decides():
    params = SamplingParams(temperature=1.0)
    logits = torch.zeros(1, 1000)
    torch.manual_seed(3)
    first = draw(params, logits, [0], 10)
    second = draw(params, logits, [0], 10)
    torch.manual_seed(3)
    assert first == draw(params, logits, [0], 10) != second


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    rows = probabilities.log().expand(4000, 4)
    pool = generators(SamplingParams(temperature=1.0, seed=0), 4000)
    share = sample(rows, processors(SamplingParams(temperature=1.0)), None, pool).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, probabilities, atol=0.03, rtol=0)
    assert share[1] == 0


def test_repetition_penalty_sees_the_own_branch_only():
    params = SamplingParams(repetition_penalty=10.0)
    logits = torch.tensor([[2.0, 1.9, 0.0], [2.0, 1.9, 0.0]])
    history = torch.tensor([[0, 0], [2, 2]])
    assert sample(logits, processors(params), history, []).tolist() == [1, 0]


def test_no_branch_no_draw():
    assert sample(torch.zeros(0, 5), processors(SamplingParams()), None, []).tolist() == []

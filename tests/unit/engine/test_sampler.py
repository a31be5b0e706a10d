"""A row's token does not depend on the other rows, and follows the distribution of transformers."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sampling_rows import Row
from transformers.generation import logits_process as hf

from parallelmind.engine import sampler
from parallelmind.engine.sampler import SampledToken, Sampler, SamplingRow, random_seed
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.model.hf_compat import process_rows

VOCAB = 300


def row(
    seed: int = 0, branch: int = 0, index: int = 0, history: Sequence[int] = (0,), **settings: Any
) -> SamplingRow:
    return Row(SamplingParams(**settings), seed, branch, index, np.array(history, dtype=np.int64))


def noise(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample_tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    return Sampler()(logits, rows).read()


def tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    return [choice.token for choice in sample_tokens(logits, rows)]


def draws(logits: torch.Tensor, count: int, **settings: Any) -> list[int]:
    """`count` tokens for one row of logits."""
    return tokens(logits.expand(count, -1), [row(index=index, **settings) for index in range(count)])


MIXED = [
    row(),
    row(temperature=1.0, seed=1),
    row(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, seed=2, branch=1, index=9, logprobs=3),
    row(temperature=1.3, top_k=40, seed=3, branch=2, logit_bias={4: 8.0, 9: -100}),
    row(temperature=0.9, top_p=0.5, seed=4, repetition_penalty=1.4, history=[3, 1, 3, 8, 250]),
    row(repetition_penalty=3.0, history=[*range(150)], logprobs=20),
    row(temperature=1.0, min_p=0.3, seed=5, logprobs=0, index=3),
    row(temperature=2.0, top_k=5, seed=6, repetition_penalty=0.5, history=[]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_alone_and_in_a_batch(dtype):
    for step in range(30):
        logits = noise(len(MIXED), seed=step).to(dtype)
        before = logits.clone()
        rows = [dataclasses.replace(one, index=one.index + step) for one in MIXED]
        together = sample_tokens(logits, rows)
        assert together == [sample_tokens(logits[at : at + 1], [one])[0] for at, one in enumerate(rows)]
        assert together[::-1] == sample_tokens(logits.flip(0), rows[::-1])
        assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_those_of_earlier_versions(dtype):
    """A sample may continue on an engine of another version."""
    expected = [
        [59, 93, 264, 257, 272, 280, 62, 7],
        [120, 299, 211, 119, 201, 227, 84, 149],
        [27, 103, 247, 4, 226, 268, 51, 147],
        [159, 269, 88, 204, 64, 163, 293, 30],
        [98, 173, 289, 4, 84, 221, 17, 159],
        [229, 242, 179, 257, 174, 209, 92, 190],
    ]
    for step, drawn in enumerate(expected):
        rows = [dataclasses.replace(one, index=one.index + step) for one in MIXED]
        assert tokens(noise(len(MIXED), seed=step).to(dtype), rows) == drawn


def test_a_sampler_that_sampled_other_rows_samples_these_by_their_own_settings():
    reused, orders = Sampler(), ([0, 1, 2], [2, 1, 0], [1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 4], [])
    for step, order in enumerate(orders * 2):
        logits, rows = noise(len(order), seed=step), [MIXED[at] for at in order]
        assert reused(logits, rows).read() == sample_tokens(logits, rows)


@pytest.mark.parametrize("vocab", [300, 1280, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_the_largest_logits_is_taken(vocab, dtype):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0)).clamp(max=1).to(dtype)
    logits[1, [vocab - 3, vocab - 1]] = 2
    logits[2] = -math.inf
    logits[2, 7] = -5
    for at, value in ((3, math.nan), (4, math.inf), (5, -math.inf)):
        logits[at, slice(None) if at == 5 else vocab // 2] = value
    assert tokens(logits, [row()] * 6) == [int((logits[0] == 1).nonzero()[0]), vocab - 3, 7, None, None, None]


def test_equal_logits_are_ranked_the_same_alone_and_in_a_batch():
    logits = torch.zeros(2, VOCAB)
    rows = [row(logprobs=2), row(logprobs=20)]
    assert sample_tokens(logits, rows)[0] == sample_tokens(logits[:1], rows[:1])[0]


def test_seed_branch_and_index_determine_a_draw():
    logits = torch.zeros(1, VOCAB)

    def drawn(**key: int) -> list[int]:
        return [tokens(logits, [row(**{"index": index, **key}, temperature=1.0)])[0] for index in range(20)]

    assert drawn(seed=7) == drawn(seed=7)
    assert (
        len(
            {
                tuple(drawn(**key))
                for key in ({"seed": 7}, {"seed": 8}, {"seed": 7, "branch": 1}, {"index": 3})
            }
        )
        == 4
    )
    assert len(set(drawn(seed=7))) > 10


def test_a_branch_continues_at_any_index():
    def run(first: int, last: int) -> list[int]:
        return [
            tokens(noise(1, seed=index), [row(index=index, temperature=1.0, top_p=0.9)])[0]
            for index in range(first, last)
        ]

    assert run(0, 10) + run(10, 20) == run(0, 20)


def test_random_seeds_come_from_the_global_generator():
    torch.manual_seed(3)
    first = [random_seed(), random_seed()]
    torch.manual_seed(3)
    assert first == [random_seed(), random_seed()]
    assert first[0] != first[1]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    for temperature in (1.0, 0.5):
        sharper = probabilities ** (1 / temperature)
        drawn = draws(probabilities.log(), 4000, temperature=temperature)
        share = torch.tensor(drawn).bincount(minlength=4) / 4000
        torch.testing.assert_close(share, sharper / sharper.sum(), atol=0.03, rtol=0)
        assert share[1] == 0


@pytest.mark.parametrize(
    ("settings", "processor"),
    [
        ([{"top_k": 1}, {"top_k": 3}, {"top_k": 12}, {"top_k": 999}], hf.TopKLogitsWarper),
        ([{"top_p": 0.2}, {"top_p": 0.6}, {"top_p": 0.9}], hf.TopPLogitsWarper),
        ([{"min_p": 0.02}, {"min_p": 0.2}, {"min_p": 1.0}], hf.MinPLogitsWarper),
    ],
)
def test_draws_follow_the_distribution_of_transformers(settings, processor):
    logits = noise(1, scale=1.5)[:, :30]
    rows = [row(index=index, temperature=1.0, **own) for index in range(2000) for own in [*settings, {}]]
    drawn = tokens(logits.expand(len(rows), -1), rows)
    for at, own in enumerate(settings):
        left = processor(*own.values())(None, logits).softmax(dim=-1)[0]
        share = torch.tensor(drawn[at :: len(settings) + 1]).bincount(minlength=30) / 2000
        torch.testing.assert_close(share, left, atol=0.04, rtol=0)
        assert not share[left == 0].any()
    assert len(set(drawn[len(settings) :: len(settings) + 1])) > 15, (
        "a row without the setting draws from all"
    )


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
def test_top_p_and_top_k_exclude_what_transformers_excludes_of_equal_logits_too(scale):
    for step in range(20):
        scores = noise(5, seed=step, scale=scale).bfloat16().float()
        top_p, top_k = torch.tensor([0.1, 0.5, 0.8, 0.95, 0.999]), torch.tensor([1, 2, 10, 100, 1000])
        with mock.patch.object(torch, "sort", partial(torch.sort, stable=True)):
            expected = process_rows(hf.TopPLogitsWarper, "top_p", top_p, scores)
        assert torch.equal(sampler._keep_top_p(scores, top_p), expected)
        alike = [hf.TopKLogitsWarper(int(k))(None, scores[at : at + 1]) for at, k in enumerate(top_k)]
        assert torch.equal(sampler._keep_top_k(scores, top_k, max_k=1000), torch.cat(alike))


def test_a_draw_never_takes_an_excluded_token():
    logits = torch.full((1, 2048), -math.inf)
    logits[0, [1023, 1024, 2047]] = 0.0
    for uniform in (0.0, 1 / 3, 2 / 3, math.nextafter(1 / 3, 1), math.nextafter(2 / 3, 0), 1 - 2.0**-53):
        with mock.patch.object(sampler, "_uniform", lambda _, uniform=uniform: uniform):
            assert tokens(logits, [row(temperature=1.0)])[0] in (1023, 1024, 2047)


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.4])
def test_repetition_penalty_is_that_of_transformers_for_histories_of_any_length(penalty):
    for step in range(20):
        logits = noise(4, seed=step)
        likeliest = logits.topk(40).indices
        histories = [likeliest[at, :length].tolist() * 2 for at, length in enumerate((1, 5, 40, 3))]
        alike = hf.RepetitionPenaltyLogitsProcessor(penalty)
        expected = [
            int(alike(torch.tensor([own]), logits[at : at + 1]).argmax()) for at, own in enumerate(histories)
        ]
        assert tokens(logits, [row(repetition_penalty=penalty, history=own) for own in histories]) == expected


def test_repetition_penalty_applies_to_the_own_branch_only():
    logits = torch.tensor([[2.0, 1.9, 0.0]] * 3)
    rows = [row(repetition_penalty=10.0, history=history) for history in ([0, 0], [2], [])]
    assert tokens(logits, rows) == [1, 0, 0]


def test_a_bias_can_force_and_forbid_a_token():
    logits = noise(4)
    best = logits.argmax(dim=-1).tolist()
    rows = [
        row(logit_bias={17: 100}),
        row(logit_bias={best[1]: -100}),
        row(logit_bias={17: 100}, temperature=1.0),
        row(),
    ]
    forced, forbidden, drawn, untouched = tokens(logits, rows)
    assert (forced, drawn, untouched) == (17, 17, best[3])
    assert forbidden == logits[1].topk(2).indices[1]
    assert best[1] not in draws(logits[1], 500, temperature=2.0, logit_bias={best[1]: -100})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_those_of_the_model_itself(dtype):
    logits = noise(4).to(dtype)
    rows = [
        row(logprobs=0),
        row(logprobs=5, temperature=2.0, top_k=3, repetition_penalty=2.0),
        row(),
        row(logprobs=20, logit_bias={17: 100}),
    ]
    plain, drawn, silent, forced = sample_tokens(logits, rows)
    expected = logits.float().log_softmax(dim=-1)
    assert plain == SampledToken(int(expected[0].argmax()), expected[0].max().item())
    assert silent == SampledToken(int(expected[2].argmax()), None)
    assert forced.token == 17
    for at, choice, count in ((1, drawn, 5), (3, forced, 20)):
        assert choice.logprob == expected[at, choice.token].item()
        ids, values = zip(*choice.top, strict=True)
        assert list(values) == expected[at].topk(count).values.tolist() == expected[at, list(ids)].tolist()


def test_a_vocabulary_may_be_smaller_than_the_number_of_logprobs():
    (choice,) = sample_tokens(torch.tensor([[0.0, 1.0, 2.0]]), [row(logprobs=20)])
    assert [token for token, _ in choice.top] == [2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_dtype_can_be_sampled(dtype):
    logits = noise(1).to(dtype)
    settings = {"temperature": 0.8, "top_p": 0.95}
    assert draws(logits, 50, **settings) == draws(logits.float(), 50, **settings)
    assert tokens(logits, [row()]) == [int(logits.argmax())]


def test_extreme_settings_still_draw_the_most_likely_token():
    logits = noise(1)
    for settings in (
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"temperature": 1e-40, "repetition_penalty": 1e-300},
    ):
        assert set(draws(logits, 20, **{"temperature": 1.0, **settings}, history=[int(logits.argmax())])) == {
            int(logits.argmax())
        }
    assert len(Counter(draws(logits, 200, temperature=1e300))) > 100


def test_a_top_k_beyond_every_float_is_the_whole_vocabulary():
    """An integer has no limit in JSON. Before, it failed the forward pass of all samples."""
    logits = noise(1).expand(20, -1)
    huge = [row(temperature=1.0, top_k=10**400, seed=seed) for seed in range(20)]
    assert tokens(logits, huge) == tokens(logits, [row(temperature=1.0, seed=seed) for seed in range(20)])


def test_no_rows_give_no_tokens():
    assert sample_tokens(torch.zeros(0, 5), []) == []


FLOATS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 1024, 5000])
def test_the_kernel_finds_the_first_largest_number_of_any_bits(dtype: torch.dtype, columns: int) -> None:
    """Rows of random bits hold NaN of both signs and infinities; others are scaled to hold none."""
    generator = torch.Generator().manual_seed(columns)
    low = torch.iinfo(FLOATS[dtype])
    bits = torch.randint(low.min, low.max, (60, columns), generator=generator, dtype=FLOATS[dtype])
    noise = torch.randn(60, columns, generator=generator).to(dtype)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -1.0], dtype=dtype)
    few = special[torch.randint(6, (60, columns), generator=generator)]
    rows = torch.cat([bits.view(dtype), noise, -noise.abs(), noise.clamp(max=0), few, few[:, :1] * noise])
    assert torch.equal(sampler._most_likely(rows), sampler._first_largest(rows))


def test_both_signs_of_nan_leave_a_row_without_a_token() -> None:
    logits = noise(4).bfloat16()
    for number, bits in enumerate([0x7FC0, -1, 0x7F81]):
        logits[number].view(torch.int16)[200] = bits
    assert [token is None for token in tokens(logits, [row()] * 4)] == [True, True, True, False]

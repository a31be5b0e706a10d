"""Coordinates, order, labels and visibility against a token-by-token reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_sample

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.layout import IGNORE, PADDING, Tokens, arrange, collate
from parallelmind.model.mask import dense_attention_mask, visibility_mask

TEXT = st.lists(st.integers(0, 99), min_size=1, max_size=7)
CONFIGS = st.builds(
    RopeConfig,
    positions=st.sampled_from(["flat", "time"]),
    visibility=st.sampled_from(["columnar", "isolated"]),
    align_to=st.sampled_from(["left", "right"]),
    branch_stride=st.sampled_from([1, 128]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 99), max_size=6), st.lists(TEXT, min_size=1, max_size=5), st.data(), CONFIGS)
def test_layout_equals_the_reference(main, branches, data, config):
    offsets = [data.draw(st.integers(0, len(branch))) for branch in branches]
    layout = arrange(Tokens.of(main, branches, offsets), config)
    expected = reference_sample(main, branches, offsets, config)
    assert layout.ids.tolist() == expected["id"]
    assert layout.sequence.tolist() == expected["sequence"]
    assert layout.branch.tolist() == expected["branch"]
    assert layout.time.tolist() == expected["time"]
    assert layout.position.tolist() == expected["position"]
    assert layout.labels.tolist() == expected["label"]
    seen = visibility_mask(
        torch.from_numpy(layout.time)[None], torch.from_numpy(layout.sequence)[None], config.visibility
    )
    assert seen[0, 0].tolist() == expected["visible"]


def test_labels_leave_out_main_the_prompt_and_branch_borders():
    layout = arrange(Tokens.of([1, 2], [[3, 4, 5], [6, 7]], [2, 0]), RopeConfig(visibility="isolated"))
    assert layout.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert layout.labels.tolist() == [IGNORE, IGNORE, IGNORE, 5, IGNORE, 7, IGNORE]


def test_main_is_index_zero_only_where_there_is_one():
    config = RopeConfig(branch_stride=10, visibility="isolated")
    assert arrange(Tokens.of([1], [[2], [3]]), config).branch.tolist() == [0, 10, 20]
    assert arrange(Tokens.of([], [[2], [3]]), config).branch.tolist() == [0, 10]


def test_delays_move_single_branches_later():
    tokens = Tokens.of([1, 2], [[3, 4], [5, 6]])
    layout = arrange(tokens, RopeConfig(visibility="isolated"), delays=np.array([0, 3]))
    assert layout.time.tolist() == [0, 1, 2, 3, 5, 6]


def test_padding_is_seen_by_nothing_and_no_row_is_empty():
    config = RopeConfig()
    batch = collate(
        [arrange(Tokens.of([1], [[2], [3]]), config), arrange(Tokens.of([], [[4]]), config)], pad_id=9
    )
    assert batch.ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.sequence.tolist() == [[0, 1, 2], [1, PADDING, PADDING]]
    assert batch.tokens == 4
    seen = visibility_mask(
        torch.from_numpy(batch.pos2d[..., 1]), torch.from_numpy(batch.sequence), "columnar"
    )
    assert seen[1, 0].tolist() == torch.eye(3, dtype=torch.bool).tolist()


def test_last_queries_are_the_last_rows_of_the_whole_mask():
    layout = arrange(Tokens.of([1, 2], [[3, 4, 5], [6, 7]]), RopeConfig())
    time, sequence = torch.from_numpy(layout.time)[None], torch.from_numpy(layout.sequence)[None]
    for policy in ("columnar", "isolated"):
        assert torch.equal(
            visibility_mask(time, sequence, policy)[:, :, -2:],
            visibility_mask(time, sequence, policy, queries=2),
        )


def test_each_attention_gets_the_mask_it_understands():
    seen = torch.tensor([[[[True, False], [True, True]]]])
    assert dense_attention_mask(seen.to("meta"), "sdpa", torch.float32).dtype == torch.bool
    for implementation in ("sdpa", "eager"):
        additive = dense_attention_mask(seen, implementation, torch.bfloat16)
        assert additive.dtype == torch.bfloat16
        assert additive[0, 0, 0].tolist() == [0.0, torch.finfo(torch.bfloat16).min]
    with pytest.raises(ValueError, match="flash_attention_2"):
        dense_attention_mask(seen, "flash_attention_2", torch.float32)


def test_a_sample_needs_branches_that_hold_tokens():
    with pytest.raises(UserError, match="at least one branch"):
        Tokens.of([1], [])
    with pytest.raises(UserError, match=r"branches\[1\]"):
        Tokens.of([1], [[2], []])

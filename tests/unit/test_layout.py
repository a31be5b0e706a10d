"""Coordinates, order, labels and visibility compared with a token-by-token reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_sample, reference_tree
from trees import DOCUMENT_TREES, TREES, tokens_of

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.layout import IGNORE, PADDING, Batch, Tokens, arrange, collate
from parallelmind.model.inputs import to_tensors
from parallelmind.model.mask import AttentionBias, dense_attention_mask

TEXT = st.lists(st.integers(0, 99), min_size=1, max_size=7)
CONFIGS = st.builds(
    RopeConfig,
    positions=st.sampled_from(["flat", "time"]),
    visibility=st.sampled_from(["columnar", "isolated"]),
    align_to=st.sampled_from(["left", "right"]),
    branch_stride=st.sampled_from([1, 128]),
)


def visible(batch: Batch, config: RopeConfig) -> torch.Tensor:
    """Bool `[rows, 1, tokens, tokens]`: which keys each query sees."""
    return AttentionBias(to_tensors(batch).placement, config.visibility).whole() > -torch.inf


@settings(max_examples=150)
@given(st.lists(st.integers(0, 99), max_size=6), st.lists(TEXT, min_size=1, max_size=5), st.data(), CONFIGS)
def test_layout_equals_the_reference(main, branches, data, config):
    offsets = [data.draw(st.integers(0, len(branch))) for branch in branches]
    layout = arrange(Tokens.of(main, branches, offsets), config)
    expected = reference_sample(main, branches, offsets, config)
    assert layout.ids.tolist() == expected["id"]
    assert layout.segment.tolist() == expected["sequence"]
    assert layout.branch.tolist() == expected["branch"]
    assert layout.time.tolist() == expected["time"]
    assert layout.position.tolist() == expected["position"]
    assert layout.labels.tolist() == expected["label"]
    assert visible(collate([layout], pad_id=0), config)[0, 0].tolist() == expected["visible"]


@settings(max_examples=150)
@given(st.one_of(TREES, DOCUMENT_TREES), CONFIGS)
def test_the_layout_of_a_tree_equals_the_reference(root, config):
    layout = arrange(tokens_of(root), config)
    expected = reference_tree(root, config)
    columns = ("id", "sequence", "branch", "time", "position", "label")
    for field, column in zip(
        ("ids", "segment", "branch", "time", "position", "labels"), columns, strict=True
    ):
        assert getattr(layout, field).tolist() == expected[column], field
    assert visible(collate([layout], pad_id=0), config)[0, 0].tolist() == expected["visible"]


def test_main_prompts_and_last_tokens_have_no_labels():
    layout = arrange(Tokens.of([1, 2], [[3, 4, 5], [6, 7]], [2, 0]), RopeConfig(visibility="isolated"))
    assert layout.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert layout.labels.tolist() == [IGNORE, IGNORE, IGNORE, 5, IGNORE, 7, IGNORE]


def test_targets_are_the_labels_of_the_tokens_before_them():
    tokens = Tokens.of([1], [[2, 3, 4, 5], [6, 7]], targets=[[True, False, True, False], [False, True]])
    layout = arrange(tokens, RopeConfig(visibility="isolated"))
    assert layout.labels.tolist() == [IGNORE, IGNORE, 4, IGNORE, IGNORE, 7, IGNORE]


def test_branch_coordinates_with_and_without_main():
    config = RopeConfig(branch_stride=10, visibility="isolated")
    assert arrange(Tokens.of([1], [[2], [3]]), config).branch.tolist() == [0, 10, 20]
    assert arrange(Tokens.of([], [[2], [3]]), config).branch.tolist() == [0, 10]


def test_delays_shift_the_time_of_branches():
    tokens = Tokens.of([1, 2], [[3, 4], [5, 6]])
    layout = arrange(tokens, RopeConfig(visibility="isolated"), delays=np.array([0, 3]))
    assert layout.time.tolist() == [0, 1, 2, 3, 5, 6]


def test_padding_sees_only_itself_and_is_seen_by_nothing():
    config = RopeConfig()
    batch = collate(
        [arrange(Tokens.of([1], [[2], [3]]), config), arrange(Tokens.of([], [[4]]), config)], pad_id=9
    )
    assert batch.ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.segment.tolist() == [[0, 1, 2], [1, PADDING, PADDING]]
    assert batch.tokens == 4
    assert visible(batch, config)[1, 0].tolist() == torch.eye(3, dtype=torch.bool).tolist()


def test_masks_have_the_form_of_each_attention():
    bias = torch.tensor([[[[0, -torch.inf], [-3, 0]]]])
    assert dense_attention_mask(bias.to("meta"), "sdpa").dtype == torch.bool
    for implementation in ("sdpa", "eager"):
        additive = dense_attention_mask(bias.bfloat16(), implementation)
        assert additive.dtype == torch.bfloat16
        assert additive[0, 0].tolist() == [[0, torch.finfo(torch.bfloat16).min], [-3, 0]]
    with pytest.raises(ValueError, match="flash_attention_2"):
        dense_attention_mask(bias, "flash_attention_2")


def test_a_sample_without_branches_or_with_an_empty_one_is_refused():
    with pytest.raises(UserError, match="at least one branch"):
        Tokens.of([1], [])
    with pytest.raises(UserError, match=r"branches\[1\]"):
        Tokens.of([1], [[2], []])

"""Block masks compared with dense ones, and the choice of attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import variant
from flexing import LargestTensor, flex_always_chosen, long_batch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.evaluation.probes import patched
from parallelmind.layout import PADDING, Tokens, arrange, collate
from parallelmind.model import attention
from parallelmind.model.adapter import add_lora
from parallelmind.model.attention import FLEX, FLEX_ABOVE, AttentionLogger, choose_attention, length_bucket
from parallelmind.model.inputs import to_tensors
from parallelmind.model.mask import AttentionBias, Placement, attention_masks, block_mask
from parallelmind.tree import UNRELATED, Tree, relations
from parallelmind.visibility import AttentionWindow

FIELDS = [
    f"{full}{axis}_{what}"
    for full in ("", "full_")
    for axis in ("kv", "q")
    for what in ("num_blocks", "indices")
]


def random_tokens(length: int) -> Placement:
    """Random time and segment of two samples of three branches, the second with padding."""
    random = torch.Generator().manual_seed(length)
    time = torch.randint(0, length, (2, length), generator=random).sort(1).values
    sequence = torch.randint(0, 4, (2, length), generator=random)
    time[1, length - length // 5 :], sequence[1, length - length // 5 :] = 0, PADDING
    return placement(time, sequence)


def placement(time: torch.Tensor, segment: torch.Tensor, branches: int = 3) -> Placement:
    """Of flat samples."""
    table = np.pad(relations(Tree.flat(branches)), (0, 1), constant_values=UNRELATED)
    return Placement(time, segment, torch.from_numpy(table).expand(len(time), -1, -1))


@pytest.mark.parametrize("length", [1, 127, 128, 300, 1100])
@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize(
    "window",
    [AttentionWindow(), AttentionWindow(window=6), AttentionWindow(chunk=100)],
    ids=["", "window", "chunk"],
)
def test_block_masks_equal_dense_masks(length, visibility, window):
    placed = random_tokens(length)
    visible = AttentionBias(placed, visibility, window=window).whole() == 0
    mask = block_mask(placed, visibility, window)
    assert torch.equal(create_mask(mask.mask_mod, 2, 1, *visible.shape[2:], device="cpu"), visible)
    expected = create_block_mask(mask.mask_mod, 2, None, *visible.shape[2:], device="cpu")
    assert mask.shape == expected.shape
    for field in FIELDS:
        torch.testing.assert_close(getattr(mask, field), getattr(expected, field), rtol=0, atol=0)


def test_block_masks_need_no_dense_mask():
    length = 8192
    placed = placement(torch.arange(length)[None], torch.ones(1, length, dtype=torch.long))
    with LargestTensor() as made:
        block_mask(placed, "isolated", AttentionWindow(window=100))
    assert made.bytes < length * length / 2


def test_isolated_branches_skip_most_blocks():
    main, branches = [1] * 1024, [[2] * 512] * 8
    config = RopeConfig(visibility="isolated")
    batch = collate([arrange(Tokens.of(main, branches), config)], pad_id=0)
    mask = block_mask(to_tensors(batch).placement, "isolated", AttentionWindow())
    assert mask.sparsity() > 65  # percent; plain causal attention skips 49


def test_there_is_a_mask_for_each_layer_type_with_its_own_window():
    config = RopeConfig()
    batch = long_batch(config)
    for name, kinds in (
        ("windows beside full attention", ["full_attention", "sliding_attention"]),
        ("shared", None),
    ):
        model = variant(name, "sdpa")
        with patched(model, config), flex_always_chosen():
            masks = attention_masks(model, batch.placement, config.visibility)
        assert kinds is None or list(masks) == kinds
        assert all(isinstance(mask, BlockMask) for mask in (masks.values() if kinds else [masks]))


def test_a_penalty_scales_the_attention_weights_of_siblings_only():
    model = variant("shared", "eager")
    text = [Tokens.of([5, 6], [[7, 8, 9], [10, 11, 12]])]
    shares = []
    for penalty in (0.0, 2.0):
        with patched(model, RopeConfig(rope_2d_ratio=0, sibling_penalty=penalty)) as config:
            layout = arrange(text[0], config)
            batch = to_tensors(collate([layout], pad_id=0))
            scores = attention_masks(model, batch.placement, "columnar")
            shares.append(torch.softmax(scores[0, 0], dim=-1))
    sequence = batch.segment
    siblings = (sequence[0, :, None] != sequence[0]) & (sequence[0] > 0) & (sequence[0, :, None] > 0)
    relative = shares[1] / shares[1].diagonal()[:, None]  # to the weight of the token itself
    expected = torch.where(siblings, torch.e**-2, 1.0) * (shares[0] > 0)
    torch.testing.assert_close(relative, expected)
    assert (siblings & (shares[0] > 0)).any()


def test_new_lengths_do_not_recompile():
    """Two compilations: for the first length, and for dynamic lengths."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, backend=counter)
    for length in (700, 300, 800, 515, 640, 1200):
        placed = placement(torch.arange(length).expand(3, -1), torch.ones(3, length, dtype=torch.long))
        query = torch.randn(3, 2, length, 16)
        actual = compiled(
            query,
            query,
            query,
            block_mask=block_mask(placed, "columnar", AttentionWindow(window=5000)),
        )
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_buckets_are_powers_of_two():
    assert [length_bucket(length) for length in (1, 2, 3, 512, 513, 8192)] == [1, 2, 4, 512, 1024, 8192]
    assert length_bucket(FLEX_ABOVE) == FLEX_ABOVE


def test_flex_attention_is_chosen_for_long_sequences_on_a_suitable_gpu(monkeypatch):
    model = variant("shared", "sdpa")
    lengths, half = (FLEX_ABOVE, FLEX_ABOVE + 1), torch.bfloat16
    with patched(model, RopeConfig()):
        assert [choose_attention(model, length, half) for length in lengths] == ["sdpa", "sdpa"]  # no GPU
        monkeypatch.setattr(attention, "_fits_device", lambda device, dtype: dtype == half)
        assert [choose_attention(model, length, half) for length in lengths] == ["sdpa", FLEX]
        assert choose_attention(model, lengths[1], torch.float32) == "sdpa"
        assert choose_attention(add_lora(model, LoraConfig(lora_rank=2), seed=0), lengths[1], half) == FLEX
        model.model.layers[1].self_attn.attention_dropout = 0.1
        assert choose_attention(model, lengths[1], half) == "sdpa"
        model.model.layers[1].self_attn.attention_dropout = 0.0
        model.set_attn_implementation("eager")
        assert choose_attention(model, lengths[1], half) == "eager"
    model.set_attn_implementation("sdpa")
    assert choose_attention(model, lengths[1], half) == "sdpa"  # an unpatched model builds its own masks


def test_unsupported_head_sizes_keep_sdpa():
    for size, reader in ((16, FLEX), (8, "sdpa")):
        model = variant("shared", "sdpa")
        model.model.layers[0].self_attn.head_dim = size
        with patched(model, RopeConfig()), flex_always_chosen():
            assert choose_attention(model, 100, model.dtype) == reader


def test_a_bucket_is_logged_unless_a_longer_one_was():
    model, lines = variant("shared", "sdpa"), []
    batches = [
        collate([arrange(Tokens.of([], [[1] * n]), RopeConfig())], pad_id=0) for n in (9, 16, 17, 12, 30, 5)
    ]
    with patched(model, RopeConfig()), flex_always_chosen():
        logger = AttentionLogger(model, torch.bfloat16, lines.append)
        first = logger(batches[:3])
        assert lines == []
        assert next(first) is batches[0]
        assert lines == ["attention: flex_attention for up to 16 tokens"]
        assert [*first, *logger(batches[3:])] == batches[1:]
    assert lines[1:] == ["attention: flex_attention for up to 32 tokens"]

"""Block masks against dense ones, and the choice between them."""

from __future__ import annotations

import pytest
import torch
from families import variant
from flexing import Largest, chosen, long_batch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.evaluation.probes import patched
from parallelmind.layout import PADDING, Tokens, arrange, collate
from parallelmind.model import attention
from parallelmind.model.adapter import add_lora
from parallelmind.model.attention import FLEX, FLEX_ABOVE, AttentionLogger, choose_attention, length_bucket
from parallelmind.model.mask import attention_masks, block_mask, visibility_mask
from parallelmind.visibility import AttentionWindow

FIELDS = [
    f"{full}{axis}_{what}"
    for full in ("", "full_")
    for axis in ("kv", "q")
    for what in ("num_blocks", "indices")
]


def places(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Time and sequence of two samples with branches of any length, the second with padding."""
    random = torch.Generator().manual_seed(length)
    time = torch.randint(0, length, (2, length), generator=random).sort(1).values
    sequence = torch.randint(0, 4, (2, length), generator=random)
    time[1, length - length // 5 :], sequence[1, length - length // 5 :] = 0, PADDING
    return time, sequence


@pytest.mark.parametrize("length", [1, 127, 128, 300, 1100])
@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize(
    "reach",
    [AttentionWindow(), AttentionWindow(window=6), AttentionWindow(chunk=100)],
    ids=["", "window", "chunk"],
)
@pytest.mark.parametrize("share", [None, 0.5, 0], ids=["whole", "half", "one query"])
def test_blocks_hold_what_is_visible(length, visibility, reach, share):
    time, sequence = places(length)
    queries = None if share is None else max(int(length * share), 1)
    seen = visibility_mask(time, sequence, visibility, queries)
    first = length - seen.shape[2]
    near = reach.within(time[:, None, first:, None], time[:, None, None, :])
    seen = seen if near is None else seen & near
    mask = block_mask(time, sequence, visibility, reach, queries)
    assert torch.equal(create_mask(mask.mask_mod, 2, 1, *seen.shape[2:], device="cpu"), seen)
    expected = create_block_mask(mask.mask_mod, 2, None, *seen.shape[2:], device="cpu")
    assert mask.shape == expected.shape
    for field in FIELDS:
        torch.testing.assert_close(getattr(mask, field), getattr(expected, field), rtol=0, atol=0)


def test_blocks_are_found_without_a_dense_mask():
    length = 8192
    time, sequence = torch.arange(length)[None], torch.ones(1, length, dtype=torch.long)
    with Largest() as made:
        block_mask(time, sequence, "isolated", AttentionWindow(window=100))
    assert made.bytes < length * length / 2


def test_isolated_branches_leave_most_blocks_out():
    main, branches = [1] * 1024, [[2] * 512] * 8
    config = RopeConfig(visibility="isolated")
    batch = collate([arrange(Tokens.of(main, branches), config)], pad_id=0)
    mask = block_mask(
        torch.from_numpy(batch.pos2d[..., 1]), torch.from_numpy(batch.sequence), "isolated", AttentionWindow()
    )
    assert mask.sparsity() > 65  # percent; plain causal attention leaves out 49


def test_a_mask_for_each_layer_type_that_reaches_as_far():
    config = RopeConfig(sibling_penalty=0)
    batch = long_batch(config)
    for name, kinds in (
        ("windows beside full attention", ["full_attention", "sliding_attention"]),
        ("shared", None),
    ):
        model = variant(name, "sdpa")
        with patched(model, config), chosen():
            masks = attention_masks(model, batch.pos2d[..., 1], batch.sequence, config.visibility)
        assert kinds is None or list(masks) == kinds
        assert all(isinstance(mask, BlockMask) for mask in (masks.values() if kinds else [masks]))


def test_a_penalty_divides_the_weight_of_siblings_and_of_nobody_else():
    model = variant("shared", "eager")
    text = [Tokens.of([5, 6], [[7, 8, 9], [10, 11, 12]])]
    shares = []
    for penalty in (0.0, 2.0):
        with patched(model, RopeConfig(rope_2d_ratio=0, sibling_penalty=penalty)) as config:
            layout = arrange(text[0], config)
            batch = collate([layout], pad_id=0)
            time, sequence = torch.from_numpy(batch.pos2d[..., 1]), torch.from_numpy(batch.sequence)
            added = attention_masks(model, time, sequence, "columnar")
            shares.append(torch.softmax(added[0, 0], dim=-1))
    away = (sequence[0, :, None] != sequence[0]) & (sequence[0] > 0) & (sequence[0, :, None] > 0)
    relative = shares[1] / shares[1].diagonal()[:, None]  # as much as what a token says to itself
    expected = torch.where(away, torch.e**-2, 1.0) * (shares[0] > 0)
    torch.testing.assert_close(relative, expected)
    assert (away & (shares[0] > 0)).any()


def test_a_new_length_is_not_compiled_anew():
    """Twice in all: for the first length, and then for any."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    read = torch.compile(flex_attention, backend=counter)
    for length in (700, 300, 800, 515, 640, 1200):
        time, sequence = torch.arange(length).expand(3, -1), torch.ones(3, length, dtype=torch.long)
        query = torch.randn(3, 2, length, 16)
        found = read(
            query,
            query,
            query,
            block_mask=block_mask(time, sequence, "columnar", AttentionWindow(window=5000)),
        )
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_buckets_are_powers_of_two():
    assert [length_bucket(length) for length in (1, 2, 3, 512, 513, 8192)] == [1, 2, 4, 512, 1024, 8192]
    assert length_bucket(FLEX_ABOVE) == FLEX_ABOVE


def test_flex_attention_is_chosen_for_long_sequences_on_a_card_it_is_made_for(monkeypatch):
    model = variant("shared", "sdpa")
    lengths, half = (FLEX_ABOVE, FLEX_ABOVE + 1), torch.bfloat16
    with patched(model, RopeConfig(sibling_penalty=0)):
        assert [choose_attention(model, length, half) for length in lengths] == ["sdpa", "sdpa"]  # no card
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
    assert choose_attention(model, lengths[1], half) == "sdpa"  # unpatched, its masks are its own


def test_heads_of_a_size_that_the_kernel_refuses_keep_sdpa():
    for size, reader in ((16, FLEX), (8, "sdpa")):
        model = variant("shared", "sdpa")
        model.model.layers[0].self_attn.head_dim = size
        with patched(model, RopeConfig(sibling_penalty=0)), chosen():
            assert choose_attention(model, 100, model.dtype) == reader


def test_a_bucket_is_announced_unless_a_longer_one_was():
    model, lines = variant("shared", "sdpa"), []
    batches = [
        collate([arrange(Tokens.of([], [[1] * n]), RopeConfig(sibling_penalty=0))], pad_id=0)
        for n in (9, 16, 17, 12, 30, 5)
    ]
    with patched(model, RopeConfig(sibling_penalty=0)), chosen():
        announced = AttentionLogger(model, torch.bfloat16, lines.append)
        first = announced(batches[:3])
        assert lines == []
        assert next(first) is batches[0]
        assert lines == ["attention: flex_attention for up to 16 tokens"]
        assert [*first, *announced(batches[3:])] == batches[1:]
    assert lines[1:] == ["attention: flex_attention for up to 32 tokens"]

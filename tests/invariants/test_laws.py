"""The laws of the patch on Llama-family models, eager and sdpa, float32, weights large enough for a leak to show."""

import pytest
import torch
from tiny import tiny_llama

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.mask import for_attention, visible
from parallelmind.model.patch import patch, rope_config, unpatch

MAIN = [5, 6, 7, 8, 9]
BRANCHES = [[20, 21, 22, 23], [30, 31, 32, 33, 34, 35], [40, 41]]
CLOSE = 1e-4
LEAK = 1e-2
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    return request.param


@pytest.fixture(params=sorted(ROPES))
def model(request, attention):
    built = tiny_llama(rope_parameters=ROPES[request.param])
    built.set_attn_implementation(attention)
    return built


def logits(model, main, branches, config, shift=0, move=None):
    """`{(sequence, time): logits}` of a whole sample, coordinates optionally shifted or one branch moved."""
    batch = collate([arrange(Tokens.of(main, branches), config)], pad_id=0)
    pos2d = torch.from_numpy(batch.pos2d)
    sequence = torch.from_numpy(batch.sequence)
    pos2d[..., 0] += shift
    if move is not None:
        pos2d[..., 0] += torch.where(sequence == move, 77, 0)
    seen = visible(pos2d[..., 1], sequence, config.visibility)
    mask = for_attention(seen, model.config._attn_implementation, model.dtype)
    with torch.no_grad():
        out = model(
            torch.from_numpy(batch.ids), pos2d=pos2d, position_ids=torch.from_numpy(batch.position), attention_mask=mask
        ).logits[0]
    return {(int(s), int(t)): row for s, t, row in zip(sequence[0], pos2d[0, :, 1], out, strict=True)}


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def of_branch(table, branch):
    return {key[1]: row for key, row in table.items() if key[0] == branch}


def test_unpatch_restores_the_model_bit_for_bit(model):
    ids = torch.tensor([MAIN])
    classes = [type(module) for module in model.modules()]
    buffers = dict(model.named_buffers())
    before = model(ids).logits
    patch(model, RopeConfig(rope_2d_ratio=1.0))
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"
    unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(UserError, match="not patched"):
        rope_config(model)


def test_ratio_zero_and_one_branch_is_the_unpatched_model(model):
    text = MAIN + BRANCHES[1]
    before = model(torch.tensor([text])).logits[0]
    patch(model, RopeConfig(rope_2d_ratio=0.0, positions="time"))
    assert torch.equal(model(torch.tensor([text])).logits[0], before)
    after = logits(model, MAIN, [BRANCHES[1]], rope_config(model))
    assert max((after[key] - before[key[1]]).abs().max() for key in after) < CLOSE


@pytest.mark.parametrize("align_to", ["left", "right"])
def test_isolated_branches_equal_their_lone_runs(model, align_to):
    patch(model, RopeConfig(rope_2d_ratio=0.0, visibility="isolated", align_to=align_to))
    config = rope_config(model)
    together = logits(model, MAIN, BRANCHES, config)
    longest = max(map(len, BRANCHES))
    for index, branch in enumerate(BRANCHES, start=1):
        delay = longest - len(branch) if align_to == "right" else 0
        if delay:
            continue  # a right-aligned shorter branch stands further from main than it does alone
        alone = of_branch(logits(model, MAIN, [branch], config), 1)
        assert distance(of_branch(together, index), alone) < CLOSE


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("visibility", ["isolated", "columnar"])
@pytest.mark.parametrize("align_to", ["left", "right"])
def test_what_a_sibling_can_change(model, ratio, visibility, align_to):
    patch(model, RopeConfig(rope_2d_ratio=ratio, visibility=visibility, align_to=align_to))
    config = rope_config(model)
    before = logits(model, MAIN, BRANCHES, config)
    changed = [list(branch) for branch in BRANCHES]
    changed[0][1] = 99
    after = logits(model, MAIN, changed, config)
    at = next(time for (sequence, time) in sorted(before) if sequence == 1) + 1
    for key in before:
        sequence, time = key
        moved = (before[key] - after[key]).abs().max().item()
        if sequence == 1 and time >= at:
            assert moved > LEAK, key
        elif visibility == "isolated" or sequence == 0 or time <= at:
            assert moved < CLOSE, key
    if visibility == "columnar":
        assert distance(of_branch(before, 2), of_branch(after, 2)) > LEAK


@pytest.mark.parametrize("pairs", ["low", "mid", "spread"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("positions", ["time", "flat"])
def test_only_differences_of_branch_coordinates_count(model, pairs, ratio, positions):
    patch(model, RopeConfig(rope_2d_ratio=ratio, pairs=pairs, positions=positions, branch_stride=3))
    config = rope_config(model)
    before = logits(model, MAIN, BRANCHES, config)
    assert distance(before, logits(model, MAIN, BRANCHES, config, shift=11)) < 1e-3
    assert distance(before, logits(model, MAIN, BRANCHES, config, move=2)) > LEAK


def test_time_positions_do_not_depend_on_the_number_of_siblings(model):
    patch(model, RopeConfig(visibility="isolated", positions="time"))
    config = rope_config(model)
    few = logits(model, MAIN, BRANCHES[:1], config)
    many = logits(model, MAIN, BRANCHES, config)
    assert distance(of_branch(few, 1), of_branch(many, 1)) < CLOSE


def test_pos2d_without_a_mask_is_refused(model):
    patch(model, RopeConfig())
    with pytest.raises(ValueError, match="attention_mask"):
        model(torch.tensor([[1, 2]]), pos2d=torch.zeros(1, 2, 2, dtype=torch.long))
    assert model(torch.tensor([[1, 2]])).logits.shape[1] == 2  # the failed call left nothing behind


def test_two_threads_never_share_coordinates(model):
    from concurrent.futures import ThreadPoolExecutor

    patch(model, RopeConfig())
    config = rope_config(model)
    samples = [(MAIN, BRANCHES), (MAIN[:2], BRANCHES[::-1])]
    expected = [logits(model, *sample, config) for sample in samples]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            found = list(pool.map(lambda sample: logits(model, *sample, config), samples))
            assert all(distance(a, b) < CLOSE for a, b in zip(expected, found, strict=True))

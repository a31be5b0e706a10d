"""FlexAttention over blocks reads what eager attention reads over a dense mask, and learns the same from
it.
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VARIANTS, model_class, variant
from flexing import chosen, gradients, long_batch, on_a_cpu, real_logits
from torch.utils import _pytree

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.evaluation.laws import check_cached_decoding, check_siblings
from parallelmind.evaluation.probes import check_close, patched
from parallelmind.evaluation.rope_configs import rope_config_grid
from parallelmind.model.adapter import add_lora
from parallelmind.model.attention import FLEX, choose_attention
from parallelmind.model.mask import attention_masks
from parallelmind.model.patch import patch

# Sinks; no attention of transformers' own; masks that a layer makes itself; heads of 512.
NEVER_CHOSEN = {
    "several",
    "table in each attention",
    "three axes of position",
    "the best few tokens only",
    "frequencies of zero",
}
MECHANISMS = (
    "shared",
    "in each attention",
    "layer types",
    "complex",
    "windows beside full attention",
    "latent attention",
)

names = pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
mechanisms = pytest.mark.parametrize("name", MECHANISMS)
every_mask = pytest.mark.parametrize(
    "config",
    rope_config_grid(visibility=("columnar", "isolated"), align_to=("left", "right"), sibling_penalty=(0.0,)),
    ids=lambda config: f"{config.visibility} {config.align_to}",
)


@pytest.fixture(autouse=True)
def _cpu():
    with on_a_cpu():
        yield


def expected_logits(name: str, config: RopeConfig) -> torch.Tensor:
    model = variant(name)
    with patched(model, config):
        return real_logits(model, long_batch(config), config)


@names
@every_mask
def test_what_is_chosen_agrees_with_eager(name, config):
    model = variant(name, "sdpa" if model_class(name)._supports_sdpa else "eager")
    with patched(model, config), chosen():
        reader = choose_attention(model, 300, model.dtype)
        found = real_logits(model, long_batch(config), config)
    assert (reader != FLEX) == (name in NEVER_CHOSEN)
    check_close(found, expected_logits(name, config), "the chosen attention and eager")


@pytest.mark.parametrize(
    "name", [name for name in [*FAMILIES, *VARIANTS] if model_class(name)._supports_flex_attn]
)
def test_a_model_that_is_set_to_flex_attention_agrees_with_eager(name):
    if name == "several":
        pytest.skip("FlexAttention has sinks on accelerators only")
    config = RopeConfig(visibility="isolated", align_to="right")
    model = variant(name, FLEX)
    with patched(model, config):
        check_close(
            real_logits(model, long_batch(config), config),
            expected_logits(name, config),
            "FlexAttention and eager",
        )


@mechanisms
@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_adapters_get_the_same_gradients(name, visibility, checkpointing):
    config = RopeConfig(visibility=visibility, sibling_penalty=0)
    model = variant(name, "sdpa")
    patch(model, config)
    adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    expected = gradients(adapted, long_batch(config), visibility)
    with chosen():
        check_close(
            gradients(adapted, long_batch(config), visibility),
            expected,
            "gradients of FlexAttention and SDPA",
        )


def test_autocast_gives_flex_attention_one_type():
    """float32 weights: rotated queries and keys are float32 again, values are not."""
    config = RopeConfig()
    model = variant("shared", "sdpa")
    patch(model, config)
    expected = gradients(model, long_batch(config), config.visibility, torch.bfloat16)
    with chosen():
        found = gradients(model, long_batch(config), config.visibility, torch.bfloat16)
    check_close(found, expected, "gradients in bfloat16", 0.25)


@mechanisms
def test_decoding_stays_dense_beside_it(name):
    model = variant(name, "sdpa")
    with chosen():
        check_cached_decoding(model)
        check_siblings(model)
    time, prompt = torch.arange(4)[None], torch.arange(3, 40)[None]
    with patched(model, RopeConfig()):
        expected = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        with chosen():
            masks = attention_masks(model, time, time * 0, "columnar", queries=4)
            said = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert all(
        isinstance(mask, torch.Tensor) for mask in (masks.values() if isinstance(masks, dict) else [masks])
    )
    assert torch.equal(said, expected)


def test_decoding_works_where_flex_attention_is_asked_for():
    check_cached_decoding(variant("shared", FLEX))


def test_a_mask_can_be_taken_apart_and_put_together():
    """As a wrapper does that looks for tensors in what it passes on."""
    config = RopeConfig()
    model = variant("shared", "sdpa")

    def rebuilt(module, args, kwargs):
        return args, _pytree.tree_map(lambda leaf: leaf, kwargs)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(rebuilt, with_kwargs=True)
    with patched(model, config), chosen():
        check_close(
            real_logits(model, long_batch(config), config),
            expected_logits("shared", config),
            "FlexAttention and eager",
        )

"""FlexAttention over blocks gives the logits and gradients of eager attention over a dense mask."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VARIANTS, model_class, variant
from flexing import flex_always_chosen, flex_on_cpu, gradients, long_batch, real_logits
from torch.utils import _pytree

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.evaluation.laws import check_cached_decoding, check_siblings
from parallelmind.evaluation.probes import check_close, patched
from parallelmind.evaluation.rope_configs import rope_config_grid
from parallelmind.model.adapter import add_lora
from parallelmind.model.attention import FLEX, choose_attention
from parallelmind.model.patch import patch

# Attention sinks; no attention interface; masks computed by layers; heads of size 512.
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
    rope_config_grid(visibility=("columnar", "isolated"), align_to=("left", "right")),
    ids=lambda config: f"{config.visibility} {config.align_to}",
)


@pytest.fixture(autouse=True)
def _cpu():
    with flex_on_cpu():
        yield


def expected_logits(name: str, config: RopeConfig) -> torch.Tensor:
    model = variant(name)
    with patched(model, config):
        return real_logits(model, long_batch(config), config)


@names
@every_mask
def test_the_chosen_attention_agrees_with_eager(name, config):
    model = variant(name, "sdpa" if model_class(name)._supports_sdpa else "eager")
    with patched(model, config), flex_always_chosen():
        chosen_attention = choose_attention(model, 300, model.dtype)
        actual = real_logits(model, long_batch(config), config)
    assert (chosen_attention != FLEX) == (name in NEVER_CHOSEN)
    check_close(actual, expected_logits(name, config), "the chosen attention and eager")


@pytest.mark.parametrize(
    "name", [name for name in [*FAMILIES, *VARIANTS] if model_class(name)._supports_flex_attn]
)
def test_a_model_set_to_flex_attention_agrees_with_eager(name):
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
def test_adapters_have_the_same_gradients(name, visibility, checkpointing):
    config = RopeConfig(visibility=visibility)
    model = variant(name, "sdpa")
    patch(model, config)
    model_with_adapter = add_lora(model, LoraConfig(lora_rank=2), seed=0).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    expected = gradients(model_with_adapter, long_batch(config), visibility)
    with flex_always_chosen():
        check_close(
            gradients(model_with_adapter, long_batch(config), visibility),
            expected,
            "gradients of FlexAttention and SDPA",
        )


def test_autocast_gives_flex_attention_one_dtype():
    """With float32 weights, rotated queries and keys are float32 and values are not."""
    config = RopeConfig()
    model = variant("shared", "sdpa")
    patch(model, config)
    expected = gradients(model, long_batch(config), config.visibility, torch.bfloat16)
    with flex_always_chosen():
        actual = gradients(model, long_batch(config), config.visibility, torch.bfloat16)
    check_close(actual, expected, "gradients in bfloat16", 0.25)


@mechanisms
def test_decoding_is_the_same(name):
    model = variant(name, "sdpa")
    with flex_always_chosen():
        check_cached_decoding(model)
        check_siblings(model)
    prompt = torch.arange(3, 40)[None]
    with patched(model, RopeConfig()):
        expected = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        with flex_always_chosen():
            tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, expected)


def test_decoding_works_for_a_model_set_to_flex_attention():
    check_cached_decoding(variant("shared", FLEX))


def test_a_block_mask_survives_a_pytree_round_trip():
    """Wrappers that look for tensors in arguments do this."""
    config = RopeConfig()
    model = variant("shared", "sdpa")

    def rebuilt(module, args, kwargs):
        return args, _pytree.tree_map(lambda leaf: leaf, kwargs)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(rebuilt, with_kwargs=True)
    with patched(model, config), flex_always_chosen():
        check_close(
            real_logits(model, long_batch(config), config),
            expected_logits("shared", config),
            "FlexAttention and eager",
        )

"""Models that do not support branches: recognised by structure, refused, decoded with one row per branch."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, variant
from torch import nn

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.engine.generate import generate, generate_text
from parallelmind.engine.request import Sample
from parallelmind.errors import UserError, UserNotice
from parallelmind.evaluation.tiny_models import tiny_config, tiny_model, tiny_tokenizer
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.adapter import add_lora, load_model_with_lora, save_adapter
from parallelmind.model.base_model import build_meta_model, load_base
from parallelmind.model.inputs import to_tensors
from parallelmind.model.lm_head import head_logits
from parallelmind.model.mask import layer_windows
from parallelmind.model.patch import patch
from parallelmind.model.patch_state import is_patched
from parallelmind.model.structure import decoder
from parallelmind.model.support import assess
from parallelmind.training.loss import target_loss
from parallelmind.visibility import AttentionWindow

REFUSED = {
    "mamba": "recurrent or convolutional state",
    "jamba": "recurrent or convolutional state",
    "lfm2": "recurrent or convolutional state",
    "rwkv": "recurrent or convolutional state",
    "gpt2": "no rotary embedding",
    "bloom": "no rotary embedding",
    "blt": "pools neighbouring tokens",
}


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_unsupported_models_are_refused_unchanged(model_type, reason):
    model = tiny_model(model_type)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=f"{model_type} .*{reason}.*patch_rope=false"):
        patch(model, RopeConfig(rope_2d_ratio=0))
    assert [type(module) for module in model.modules()] == classes
    assert not is_patched(model)


def test_unsupported_models_are_refused_before_weights_are_read(tmp_path):
    """The folder has no weights, and the error is still about branches."""
    tiny_config("mamba").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="recurrent or convolutional state.*patch_rope=false"):
        load_model_with_lora(base_model=str(tmp_path))


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "gpt2", "bloom"])
def test_unsupported_models_decode_branches_in_separate_rows(tmp_path, model_type):
    tiny_model(model_type).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model_with_lora(base_model=str(tmp_path), patch_rope=False)
    branches, options = [[20, 21], [30]], {"max_new_tokens": 4, "ignore_eos": True}
    with pytest.warns(UserNotice, match=f"{model_type} .*isolated, in a row of its own"):
        together = generate(model, tokenizer, Sample(main=[5, 6, 7], branches=branches), **options)
    assert together == [generate_text(model, tokenizer, [5, 6, 7, *branch], **options) for branch in branches]


def test_separate_rows_need_a_cache():
    with pytest.raises(UserError, match="openai-gpt keeps no state"):
        generate(tiny_model("openai-gpt"), tiny_tokenizer(), Sample(branches=[[5], [6]]), max_new_tokens=2)


def test_an_unpatched_supported_model_refuses_branches():
    with pytest.raises(UserError, match="2 given, but the model is not patched"):
        generate(tiny_model("llama"), tiny_tokenizer(), Sample(branches=[[5], [6]]), max_new_tokens=2)


@pytest.mark.parametrize("model_type", ["llama", "llama4_text", "mamba", "gpt2", "minimax_m3_vl_text"])
def test_support_is_decided_on_the_meta_device(model_type):
    """The result is that of the model with weights."""
    assert assess(build_meta_model(tiny_config(model_type))) == assess(tiny_model(model_type))


@pytest.mark.parametrize(
    ("model_type", "windows"),
    [
        ("llama", {"full_attention": AttentionWindow()}),
        ("mistral", {"sliding_attention": AttentionWindow(window=6)}),
        (
            "moshi",
            {"full_attention": AttentionWindow()},
        ),  # its configuration has a window that its code does not apply
        (
            "gemma3_text",
            {"sliding_attention": AttentionWindow(window=6), "full_attention": AttentionWindow()},
        ),
        ("llama4_text", {"chunked_attention": AttentionWindow(chunk=6), "full_attention": AttentionWindow()}),
    ],
)
def test_layer_windows(model_type, windows):
    assert layer_windows(build_meta_model(tiny_config(model_type))) == windows


@pytest.mark.parametrize(
    "model_type", "cohere gemma2 granite minicpm3 modernbert-decoder nanochat llama4_text".split()
)
@torch.no_grad()
def test_logits_from_hidden_states_equal_the_models(model_type):
    """Scaled, soft-capped and biased heads."""
    model = tiny_model(model_type)
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(head_logits(model, hidden[1:]), model(ids).logits[0, 1:])


def adapted_layers(model_type: str) -> set[str]:
    adapted = add_lora(tiny_model(model_type), LoraConfig(lora_rank=2), seed=0)
    return {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}


def test_towers_and_routers_get_no_adapter():
    layers = adapted_layers("gemma3")
    assert layers
    assert not [name for name in layers if "vision" in name]
    assert not [name for name in adapted_layers("llama4_text") if "router" in name]


def test_an_adapter_for_an_unpatched_model(tmp_path):
    """With patch_rope=false it is trained on single branches, saved and loaded like any other."""
    rope, lora, folder = RopeConfig(patch_rope=False), LoraConfig(lora_rank=2), tmp_path / "base"
    tiny_model("mamba").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    base = ModelConfig(base_model=str(folder))
    model, tokenizer = load_base(base)
    adapted = add_lora(model, lora, seed=0)
    batch = to_tensors(
        collate([arrange(Tokens.of([], [text]), rope) for text in ([5, 6, 7], [8, 9])], pad_id=0)
    )
    loss, targets = target_loss(adapted, batch, "isolated")
    loss.backward()
    assert targets == 3
    trained_weights = [
        weight for weight in adapted.parameters() if weight.grad is not None and weight.grad.any()
    ]
    assert trained_weights
    with torch.no_grad():
        for weight in trained_weights:
            weight.sub_(weight.grad.sign())
    save_adapter(adapted, tokenizer, tmp_path / "adapter", base, rope, lora)
    loaded, _ = load_model_with_lora(lora_path=tmp_path / "adapter")
    torch.testing.assert_close(
        loaded(torch.tensor([[5, 6, 7]])).logits, adapted.eval()(torch.tensor([[5, 6, 7]])).logits
    )


def test_errors_of_peft_become_one_line():
    with pytest.raises(UserError, match="lora_targets=out_proj: .*incompatible with Mamba"):
        add_lora(tiny_model("mamba"), LoraConfig(lora_targets="out_proj"), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_decoder_is_adapted(family):
    model = variant(family)
    linears = {name for name, module in decoder(model).named_modules() if type(module) is nn.Linear}
    adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0)
    layers = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert linears == {name.partition(".model.")[2].partition(".")[2] for name in layers}

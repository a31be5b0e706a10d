"""The formula of the memory estimates against the tensors that autograd keeps."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.adapter import add_lora
from parallelmind.model.base_model import build_meta_model
from parallelmind.model.inputs import decoder_inputs, to_tensors
from parallelmind.model.patch import patch
from parallelmind.model.structure import causal_lm, decoder
from tools.marked import filled
from tools.memory import PAGE, PART, QWEN, Shape, table

SMALL = Shape("small", width=256, inner=1024, layers=2, keys=128, vocabulary=200, tied=True)


def llama(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.keys // 64,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )


def kept_bytes(model: torch.nn.Module, tokens: int) -> int:
    """Return the bytes that a forward pass of the decoder saves for the backward pass, without weights."""
    inner, storages = causal_lm(model), {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        # The reference keeps the storage alive, so that its address stays unique.
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    branches = [[5] * (tokens // 2)] * 2
    batch = to_tensors(collate([arrange(Tokens.of([], branches), RopeConfig())], pad_id=0))
    with (
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        decoder(inner)(**decoder_inputs(inner, batch, "columnar"))
    return sum(
        tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in weights
    )


def test_saved_bytes_per_token_match_the_formula() -> None:
    model = LlamaForCausalLM(llama(SMALL)).to(torch.bfloat16)
    patch(model, RopeConfig())
    adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0).train()
    more = kept_bytes(adapted, 512) - kept_bytes(adapted, 256)  # costs per call cancel out
    mask = 2 * (512**2 - 256**2)
    assert (more - mask) / 256 == pytest.approx(SMALL.layers * SMALL.token(), rel=0.1)


def test_adapter_size_matches_the_formula() -> None:
    adapted = add_lora(LlamaForCausalLM(llama(SMALL)), LoraConfig(lora_rank=4), seed=0)
    assert sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad) == SMALL.lora(4)


@pytest.mark.parametrize("shape", QWEN, ids=lambda shape: shape.name)
def test_shapes_match_the_models(shape: Shape) -> None:
    model = build_meta_model(Qwen2Config(**{**llama(shape).to_dict(), "model_type": "qwen2"}))
    count = sum(weight.numel() for weight in model.parameters())
    # The formula leaves out biases and norms.
    assert shape.linear + shape.embeddings == pytest.approx(count, rel=1e-3)


def test_the_table_in_the_docs_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, PART, table()) == page, "run make docs"

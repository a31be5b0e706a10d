"""Quantised base weights by bitsandbytes. LoRA weights stay in float32."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from parallelmind.config import ModelConfig
from parallelmind.hardware import decided_dtype
from parallelmind.model.preflight import check_quantize


def quantization_config(config: ModelConfig) -> BitsAndBytesConfig | None:
    """The settings for bitsandbytes, None for no quantisation. Raises UserError if it is not installed."""
    if config.quantize == "none":
        return None
    check_quantize(config.quantize)
    if config.quantize == "8bit":
        # Its layers compute in float16 and log that on every call.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, decided_dtype(config.dtype)),
    )


def keep_differentiable(model: nn.Module) -> None:
    """Let the 4-bit layers of a model on the CPU compute in training and in eval mode by the same weights.

    A layer of bitsandbytes that is called in eval mode repacks its weights for a kernel without gradients,
    and then uses it in training, too: the gradients of all layers below are wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

"""Tiny random models of every causal-LM type of transformers, built from config classes without a download.

Sizes are chosen by field name, because a name has the same meaning in most config classes. Fields that a type
couples are listed by type. Each model has every kind of layer of its type, windows shorter than the test
texts, and weights large enough that one leaked token changes the logits visibly.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from parallelmind.model.base_model import build_meta_model

VOCABULARY = 128
WINDOW = 6  # tokens
_MAX_PARAMETERS = 40_000_000  # guards against a type whose size fields are not listed below

_FIELDS_BY_SIZE: dict[int, str] = {
    512: ("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions"),
    64: (
        "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim "
        "input_embedding_size output_embedding_size backbone_hidden_size output_proj_dims mm_embed_dim "
        "lru_width pronunciation_embed_dim shape_embed_dim intermediate_size ffn_dim n_inner "
        "decoder_ffn_dim encoder_ffn_dim d_inner dim_ff dff ffn_hidden_size moe_intermediate_size "
        "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size "
        "expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp "
        "prefix_dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size "
        "pronunciation_vocab_size shape_vocab_size adapter_in_dim adapter_hidden_dim adapter_out_dim "
        "adapter_input_size"
    ),
    16: (
        "head_dim swa_head_dim global_head_dim kv_channels dim_head d_head v_head_dim qk_nope_head_dim "
        "qk_rope_head_dim qk_head_dim index_head_dim indexer_head_dim rotary_dim linear_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim kv_lora_rank q_lora_rank "
        "o_lora_rank laurel_rank adapter_rank gated_norm_rank router_hidden_size hc_lowrank "
        "hidden_size_per_layer_input attention_head_size num_centroids image_size index_n_heads"
    ),
    WINDOW: (
        "sliding_window sliding_window_size attention_window_size attention_chunk_size local_attention "
        "window_size keep_window_size"
    ),
    8: "mamba_n_heads mamba_num_heads",
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads swa_num_attention_heads linear_num_heads linear_num_key_heads "
        "linear_num_value_heads num_experts n_routed_experts num_local_experts moe_num_experts "
        "zero_expert_num index_topk patch_size"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
        "num_decoder_layers num_key_value_heads swa_num_key_value_heads num_kv_heads "
        "num_experts_per_tok moe_topk moe_k top_k_experts eos_token_id"
    ),
    1: (
        "n_group topk_group num_shared_experts n_shared_experts moe_num_shared_experts num_mtp_layers "
        "bos_token_id first_k_dense_replace num_dense_layers moe_layer_start_index"
    ),
    0: "pad_token_id num_kv_shared_layers",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
}
_SIZES = {name: size for size, names in _FIELDS_BY_SIZE.items() for name in names.split()}

# Fields that a type's validation couples, or that have no usable default.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64},
    },
    "dots3_note_text": {
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(
            ("swa_q_lora_rank", "swa_kv_lora_rank", "swa_qk_nope_head_dim", "swa_v_head_dim"), 16
        ),
        "swa_head_dim": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_lm_types() -> list[str]:
    """All model types of `AutoModelForCausalLM`."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A config of the type with small sizes. Raises any error of the config class's own validation."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**{**_small_values(config_class), **overrides})


def tiny_model(model_type: str, attention: str = "eager", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model in eval mode, with weights determined by the seed.

    Raises ValueError for a type that cannot be made small.
    """
    config = tiny_config(model_type, **overrides)
    parameters = sum(weight.numel() for weight in build_meta_model(config).parameters())
    if parameters > _MAX_PARAMETERS:
        raise ValueError(f"{model_type} has {parameters:,} parameters at its smallest")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1 or not weight.any():
                    weight.normal_(0, 0.3)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one word for each token id of a tiny model."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )


def _small_values(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Constructor arguments for a small config, sub-configs included."""
    names = [field.name for field in fields(config_class)] if is_dataclass(config_class) else []
    values: dict[str, Any] = {name: _SIZES[name] for name in names if name in _SIZES}
    if "kv_lora_rank" in names:  # latent attention has as many key heads as query heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    overrides = _OVERRIDES.get(config_class.model_type, {})
    try:
        default = config_class()
    except ValueError:  # a few classes reject their own defaults
        default = config_class(**overrides)
    values |= _layer_types(default, names)
    if "is_decoder" in names:  # encoders that can be used as causal LMs
        values["is_decoder"] = True
    for name in getattr(config_class, "sub_configs", {}):
        sub_config = getattr(default, name, None)
        if isinstance(sub_config, PreTrainedConfig):
            values[name] = {"model_type": sub_config.model_type, **_small_values(type(sub_config))}
    return {**values, **overrides}


def _layer_types(default: PreTrainedConfig, names: list[str]) -> dict[str, Any]:
    """Fields of the shortest model that has every layer type of `default` and at least two layers."""
    values: dict[str, Any] = {}
    types_by_field = {
        name: list(dict.fromkeys(getattr(default, name, None) or ()))
        for name in ("layer_types", "mlp_layer_types")
    }
    count = max(2, *map(len, types_by_field.values()))
    for name, layer_types in types_by_field.items():
        if layer_types and name in names:
            values[name] = (layer_types * count)[:count]
    if values:
        values |= {name: count for name in ("num_hidden_layers", "n_layer", "num_layers") if name in names}
    return values

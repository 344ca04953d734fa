"""Tiny random models of every type of transformers' causal language models, for the sweep over them.

A config class's own defaults are made small by the names of its fields; OVERRIDES has what a type needs besides.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 400
CONTEXT = 640  # more than one piece of a prompt, as the engine reads it

# One value for every field of that name, in any config. Windows and chunks are shorter than the sweep's prompts.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32,
    "embedding_dim": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2,
    "encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "num_blocks": 2, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "global_head_dim": 8, "intermediate_size": 64,
    "ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "dff": 64, "d_inner": 64, "dim_ff": 64,
    "ffn_hidden_size": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "intermediate_size_mlp": 64, "dense_intermediate_size": 64, "max_position_embeddings": CONTEXT,
    "n_positions": CONTEXT, "n_ctx": CONTEXT, "max_seq_len": CONTEXT, "model_max_length": CONTEXT,
    "context_length": CONTEXT, "max_target_positions": CONTEXT, "sliding_window": 8, "sliding_window_size": 8,
    "attention_window_size": 8, "window_size": 8, "local_attention": 8, "attention_chunk_size": 8,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "qk_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "o_lora_rank": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "index_head_dim": 8, "index_n_heads": 16, "index_topk": 64,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8,
    "mamba_dt_rank": 4, "time_step_rank": 4, "lru_width": 32, "attention_hidden_size": 32, "word_embed_proj_dim": 32,
    "rotary_dim": 4, "kv_channels": 8, "dim_head": 8, "d_head": 8, "type_vocab_size": 2,
    "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "first_k_dense_replace": 1, "query_pre_attn_scalar": 8,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

_HEADS = {"num_key_value_heads": 4}  # attention through a latent has a key and a value for each head
_MLA = {"head_dim": 4, **_HEADS}  # where head_dim is the rotated part
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_QWEN4 = {
    **_INDEXER, "hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 8, "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
    "split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip
_GEMMA_3N = {
    "intermediate_size": [64, 64, 64], "num_hidden_layers": 3, "num_kv_shared_layers": 0, "laurel_rank": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.5, 0.0, 0.0], "hidden_size_per_layer_input": 8,
}  # fmt: skip
_LLAMA_4 = {
    "num_hidden_layers": 2, "moe_layers": [1], "no_rope_layers": [1, 0], "num_experts_per_tok": 1,
    "layer_types": ["chunked_attention", "full_attention"],
}  # fmt: skip
_BLT_PART = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": CONTEXT, "hidden_size_global": 32,
}  # fmt: skip

# What the rule above gets wrong, for each type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "axk2": _MLA, "deepseek_v3": _MLA, "deepseek_v32": _MLA, "glm_moe_dsa": _MLA, "longcat_flash": _MLA,
    "youtu": _MLA, "glm4_moe_lite": _HEADS, "minicpm3": _HEADS, "kimi_linear": _HEADS,
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1]},
    "blt": {
        "patcher_config": _BLT_PART, "encoder_config": _BLT_PART, "decoder_config": _BLT_PART,
        "global_config": _BLT_PART, "encoder_hash_byte_group_vocab": 64, "vocab_size": 260,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "fuyu": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "image_token_id": 3},
    "deepseek_v2": {"num_experts_per_tok": 2, **_MLA},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
    "gemma3n": {"text_config": _GEMMA_3N}, "gemma3n_text": _GEMMA_3N, "gemma3": {"vision_config": _VISION},
    "git": {"vision_config": {**_VISION, "image_size": 32}},
    "got_ocr2": {"vision_config": {**_VISION, "image_size": 64, "mlp_dim": 16, "global_attn_indexes": [0]}},
    "granitemoehybrid": {**_MAMBA_HEADS, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8}, "ministral": {"head_dim": 8},
    "inkling_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 16, "d_rel": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": _LLAMA_4, "vision_config": _VISION}, "llama4_text": _LLAMA_4,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
    },
    "phi4_multimodal": {
        "vision_config": {**_VISION, "image_size": 32, "crop_size": 32, "patch_size": 8},
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
                         "ext_pw_out_channel": 16, "nemo_conv_channels": 16},
    },
    "qwen4_exp": {"text_config": _QWEN4}, "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [20, 32],
        "axial_pos_embds_dim": [8, 24], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4,
        "hash_seed": 0, "attention_head_size": 8, "feed_forward_size": 64,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roc_bert": {
        "is_decoder": True, "pronunciation_embed_dim": 8, "shape_embed_dim": 8, "pronunciation_vocab_size": 32,
        "shape_vocab_size": 32,
    },
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "xlstm": {"num_heads": 4, "hidden_size": 64, "embedding_dim": 64},
    "zamba": {
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 8,
        "mamba_headdim": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
        "adapter_rank": 4, "num_mem_blocks": 1, "kv_channels": 8, "hybrid_layer_ids": [1, 2],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def model_types() -> list[str]:
    """Every model_type that transformers can load as a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of the type that makes a model of a few thousand parameters. Raises whatever its class raises."""
    kind = CONFIG_MAPPING[model_type]
    overrides = dict(OVERRIDES.get(model_type, {}))
    try:
        default = kind()
    except Exception:  # some have no defaults
        return kind(**overrides)
    text = default.get_text_config(decoder=True)
    name = next((name for name in default.sub_configs if getattr(default, name) is text), None)
    if name is None:
        return kind(**{**_shrink(default), **overrides})
    return kind(**{name: {**_shrink(text), **overrides.pop(name, {})}, **overrides})


def _shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Small values for the fields of one config; lists with an entry for each layer keep one layer of each kind."""
    found = config.to_dict()
    small = {name: _SMALL[name] for name, value in found.items() if name in _SMALL and type(value) is int}
    small |= {name: _SMALL[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if found.get("is_decoder") is False:
        small["is_decoder"] = True
    layers = next((name for name in _LAYERS if isinstance(found.get(name), int)), None)
    if layers is None:
        return small
    lists = {name: value for name, value in found.items() if isinstance(value, list) and len(value) == found[layers]}
    kept = _one_of_each(list(zip(*lists.values(), strict=True))) if lists else []
    if kept:
        small[layers] = len(kept)
        small |= {name: [value[at] for at in kept] for name, value in lists.items()}
    return small


def _one_of_each(kinds: list[tuple]) -> list[int]:
    """The first layer of each kind, at least two layers."""
    first = sorted({str(kind): at for at, kind in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) > 1 else [0, 1]


def tiny_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model of the type whose answers depend on all of the past."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    randomise(model)
    return model.eval()


def randomise(model: PreTrainedModel, *, scale: float = 0.2) -> None:
    """Weights far enough from zero that greedy answers have no ties and every layer matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, scale)

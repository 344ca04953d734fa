"""Tiny models of every family that the LLaMA engine computes, made by transformers: one or more rows a family."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = dict(
    vocab_size=120, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
    intermediate_size=80, max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1000.0,
}  # fmt: skip
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


def longrope(num_pairs: int, **more: float) -> dict[str, object]:
    """Settings whose factors differ from pair to pair, and between short and long sequences."""
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * pair for pair in range(num_pairs)],
        "long_factor": [2.0 + 0.5 * pair for pair in range(num_pairs)], **more,
    }  # fmt: skip


SLIDING, FULL = "sliding_attention", "full_attention"
# name -> (model_type, what its config has beside SMALL)
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, exact gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn with options": (
        "llama", {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1,
                                      "truncate": False}},
    ),
    "llama, yarn with a factor for the table": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}}),
    "llama, longrope": ("llama", {"rope_parameters": longrope(4, factor=4.0)}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True}),
    "ministral": ("ministral", {"sliding_window": 9, "head_dim": 8, "layer_types": [FULL, SLIDING, SLIDING]}),
    "ministral, all windowed": ("ministral", {"sliding_window": 20, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, some windows": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases and windows": (
        "qwen3", {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 11,
                  "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "phi3": ("phi3", {}),
    "phi3, window and part of a head": (
        "phi3", {"sliding_window": 9, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3, longrope": (
        "phi3", {"original_max_position_embeddings": 64,
                 "rope_parameters": {**longrope(3), "partial_rotary_factor": 0.75}},
    ),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma, exact gelu, biases, own head": (
        "gemma", {"head_dim": 8, "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 12}),
    "gemma2, no caps": (
        "gemma2", {"head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                   "layer_types": [FULL, FULL, SLIDING]},
    ),
    "gemma2, strong caps": (
        "gemma2", {"head_dim": 8, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
                   "attention_bias": True},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 9, "rope_parameters": _TWO_ROPES,
                               "sliding_window_pattern": 3, "query_pre_attn_scalar": 12}),
    "gemma3, a cap of logits": (
        "gemma3_text", {"head_dim": 8, "sliding_window": 200, "final_logit_softcapping": 3.0,
                        "attn_logit_softcapping": 1.0, "layer_types": [FULL, SLIDING, FULL]},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3, listed, with windows": (
        "smollm3", {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 9,
                    "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "granite": (
        "granite", {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
                    "logits_scaling": 2.5},
    ),
    "granite, plain": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo2, biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    "exaone4": ("exaone4", {"sliding_window": 9, "sliding_window_pattern": 2}),
    "exaone4, no windows": ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 3, "head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "intermediate_size": 32}),
    "mixtral, window, all experts": (
        "mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 9, "tie_word_embeddings": True,
                    "head_dim": 16},
    ),
    "qwen3_moe": (
        "qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
    "qwen3_moe, not normalized, biases, window": (
        "qwen3_moe", {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "attention_bias": True,
                      "head_dim": 16, "use_sliding_window": True, "sliding_window": 9},
    ),
}  # fmt: skip
# One of each kind of difference: fast tests take these, and `--all` takes every row.
COVERING = ("qwen3, biases and windows", "phi3, window and part of a head", "gemma2", "olmo2", "qwen3_moe")


def make(name: str, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """A row's model with random weights, its norms and biases too. Attention is transformers' plain one.

    Its fused one leaves Gemma 2's cap of scores out.
    """
    model_type, differs = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **differs, **changes})
    plain = {"attn_implementation": "eager"}
    if hasattr(config, "num_experts_per_tok"):
        plain["experts_implementation"] = "eager"  # the other ways have no float64
    model = AutoModelForCausalLM.from_config(config, **plain).to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(-0.5, 0.5) if model_type.startswith("gemma") else parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model


def save(folder: Path, name: str, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """`make`, written to a folder."""
    model = make(name, dtype, **changes)
    model.save_pretrained(folder)
    return model

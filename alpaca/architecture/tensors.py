"""The tensors of a LLaMA by their roles, with each format's name for them: one table, read in every direction.

Whoever needs a name asks by role: `hf_name("query", 3)` is "model.layers.3.self_attn.q_proj.weight". GGUF's names
follow from Hugging Face's by a map of the package gguf.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """A tensor's names: Hugging Face's module and Meta's, both within a layer for the layers' tensors.

    shard_axis: the axis on which Meta's model parallelism (fairscale) splits it; None: every shard holds a copy.
    """

    role: str
    hf: str
    meta: str
    shard_axis: int | None


def _name(role: str, hf: str, meta: str, shard_axis: int | None) -> TensorName:
    return TensorName(role=role, hf=hf, meta=meta, shard_axis=shard_axis)


LAYER = {
    name.role: name
    for name in (
        _name("query", "self_attn.q_proj", "attention.wq", 0),
        _name("key", "self_attn.k_proj", "attention.wk", 0),
        _name("value", "self_attn.v_proj", "attention.wv", 0),
        _name("attention_out", "self_attn.o_proj", "attention.wo", 1),
        _name("gate", "mlp.gate_proj", "feed_forward.w1", 0),
        _name("down", "mlp.down_proj", "feed_forward.w2", 1),
        _name("up", "mlp.up_proj", "feed_forward.w3", 0),
        _name("attention_norm", "input_layernorm", "attention_norm", None),
        _name("ffn_norm", "post_attention_layernorm", "ffn_norm", None),
    )
}
# Meta splits the embedding of LLaMA 1 and 2 on its width; Llama 3's is split on axis 0, which its shapes tell.
OUTER = {
    name.role: name
    for name in (
        _name("embedding", "model.embed_tokens", "tok_embeddings", 1),
        _name("norm", "model.norm", "norm", None),
        _name("head", "lm_head", "output", 0),
    )
}
# The engine's layers: what reads the same input is one matrix, its parts' rows end to end.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv": ("query", "key", "value"),
    "attention_out": ("attention_out",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
LAYER_PREFIX = "model.layers."
_STORED_ROTARY_TABLE = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs)")


def module_name(role: str, layer: int | None = None) -> str:
    """Hugging Face's module of a role: "lm_head" of "head", "model.layers.3.mlp.up_proj" of "up" in layer 3."""
    return OUTER[role].hf if layer is None else f"{LAYER_PREFIX}{layer}.{LAYER[role].hf}"


def hf_name(role: str, layer: int | None = None) -> str:
    """The weight of a role in a Hugging Face folder."""
    return f"{module_name(role, layer)}.weight"


def meta_name(role: str, layer: int | None = None) -> str:
    """The weight of a role in Meta's files."""
    return f"{OUTER[role].meta}.weight" if layer is None else f"layers.{layer}.{LAYER[role].meta}.weight"


def is_rotary_table(name: str) -> bool:
    """Whether a tensor is a stored rotary table, in either format: models compute it anew, and nobody reads it."""
    return _STORED_ROTARY_TABLE.fullmatch(name) is not None

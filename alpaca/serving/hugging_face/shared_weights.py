"""A transformers model over the LLaMA engine's weights, for beam search without a second copy of them in memory."""

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alpaca.architecture.tensors import FUSED, LAYER, hf_name
from alpaca.serving.kernels.linear import Linear, PlainLinear
from alpaca.serving.llama.network import LlamaLayer, LlamaModel


def as_transformers(model: LlamaModel, folder: Path) -> LlamaForCausalLM | None:
    """The engine's model as one of transformers that shares its tensors; None if they are packed or quantized."""
    tensors = _tensors(model)
    if tensors is None:
        return None
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin.load_state_dict(tensors, strict=True, assign=True)
    twin.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.device)  # its tables are in no state dict
    return twin.requires_grad_(False).eval()


def _tensors(model: LlamaModel) -> dict[str, torch.Tensor] | None:
    """The model's tensors by their names in a checkpoint; None if a linear layer does not hold its plain weight."""
    linears = [model.head, *(linear for layer in model.layers for linear in _linears(layer))]
    if not all(isinstance(linear, PlainLinear) for linear in linears):
        return None
    tensors = {
        hf_name("embedding"): model.embedding,
        hf_name("norm"): model.norm,
        hf_name("head"): model.head.weight,
    }
    rows = model.config.layer_shapes
    for index, layer in enumerate(model.layers):
        for name, roles in FUSED.items():
            parts = getattr(layer, name).weight.split([rows[f"{LAYER[role].hf}.weight"][0] for role in roles])
            tensors |= {hf_name(role, index): part for role, part in zip(roles, parts, strict=True)}
        tensors |= {hf_name("attention_norm", index): layer.input_norm, hf_name("ffn_norm", index): layer.ffn_norm}
    return tensors


def _linears(layer: LlamaLayer) -> tuple[Linear, ...]:
    return layer.qkv, layer.attention_out, layer.gate_up, layer.down

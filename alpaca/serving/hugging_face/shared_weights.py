"""transformers' LLaMA over the engine's own weights: what beam search runs on, without a second copy of the model."""

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alpaca.serving.kernels.linear import Linear, PlainLinear
from alpaca.serving.llama.network import LlamaLayer, LlamaModel


def as_transformers(model: LlamaModel, folder: Path) -> LlamaForCausalLM | None:
    """The network as transformers has it, its parameters views of ours; None where ours are packed or quantized."""
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
    """Every tensor under its name in a checkpoint."""
    linears = [model.head, *(linear for layer in model.layers for linear in _linears(layer))]
    if not all(isinstance(linear, PlainLinear) for linear in linears):
        return None
    tensors = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head.weight,
    }
    config = model.config
    q_width, kv_width = (heads * config.head_width for heads in (config.num_heads, config.num_kv_heads))
    for index, layer in enumerate(model.layers):
        q, k, v = layer.qkv.weight.split([q_width, kv_width, kv_width])
        gate, up = layer.gate_up.weight.chunk(2)
        own = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": layer.attention_out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": layer.down.weight, "input_layernorm": layer.input_norm,
            "post_attention_layernorm": layer.ffn_norm,
        }  # fmt: skip
        tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in own.items()}
    return tensors


def _linears(layer: LlamaLayer) -> tuple[Linear, ...]:
    return layer.qkv, layer.attention_out, layer.gate_up, layer.down

"""A transformers model over the LLaMA engine's weights, for beam search without a second copy of them in memory."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alpaca.architecture.families import HEAD_NORMS
from alpaca.architecture.tensors import hf_name
from alpaca.formats.hf.loading import keep_score_cap
from alpaca.serving.kernels.linear import PlainLinear
from alpaca.serving.llama.network import LlamaLayer, LlamaModel


def as_transformers(model: LlamaModel, folder: Path) -> PreTrainedModel | None:
    """The engine's model as one of transformers that shares its tensors; None if they are packed or quantized.

    Nor are those of experts shared, which transformers lays end to end.
    """
    tensors = None if model.config.num_experts else _tensors(model)
    if tensors is None:
        return None
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config)
    keep_score_cap(twin)
    twin.load_state_dict(tensors, strict=True, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.device)  # its tables are in no state dict
    embedding = twin.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):  # nor is Gemma's multiplier
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=model.device)
    if any(buffer.is_meta for buffer in twin.buffers()):
        return None
    return twin.requires_grad_(False).eval()


def _tensors(model: LlamaModel) -> dict[str, torch.Tensor] | None:
    """The model's tensors by their names in a checkpoint; None if a linear layer does not hold its plain weight."""
    linears = [model.head, *(linear for layer in model.layers for linear in layer.linears)]
    if not all(isinstance(linear.product, PlainLinear) for linear in linears):
        return None
    tensors = {
        hf_name("embedding"): model.embedding,
        hf_name("norm"): _stored_norm(model.norm, model),
        hf_name("head"): model.head.weight,
    }
    for index, layer in enumerate(model.layers):
        prefix = f"{model.config.family.prefix}{index}."
        tensors |= {f"{prefix}{name}": tensor for name, tensor in _layer_tensors(layer, model).items()}
    return tensors


def _layer_tensors(layer: LlamaLayer, model: LlamaModel) -> dict[str, torch.Tensor]:
    """A layer's tensors by their names in it."""
    family, shapes = model.config.family, model.config.layer_shapes
    norms = {name: _stored_norm(getattr(layer, place), model) for place, name in family.norms.items()}
    tensors = {f"{name}.weight": norm for name, norm in norms.items()}
    for name, modules in family.fused.items():
        linear = getattr(layer, name)
        rows = [shapes[f"{module}.weight"][0] for module in modules]
        tensors |= {
            f"{module}.weight": part for module, part in zip(modules, linear.product.weight.split(rows), strict=True)
        }
        if linear.bias is not None:
            tensors |= {f"{m}.bias": part for m, part in zip(modules, linear.bias.split(rows), strict=True)}
    return tensors | {f"{name}.weight": norm for name, norm in _head_norms(layer, model).items()}


def _head_norms(layer: LlamaLayer, model: LlamaModel) -> dict[str, torch.Tensor]:
    if not layer.head_norms:
        return {}
    rows = [weight for _, weight in layer.head_norms]
    found = (rows[0][0], rows[1][0]) if len(rows) == 2 else (rows[0][0], rows[0][model.config.num_heads])
    return {name: _stored_norm(norm, model) for name, norm in zip(HEAD_NORMS, found, strict=True)}


def _stored_norm(norm: torch.Tensor, model: LlamaModel) -> torch.Tensor:
    """A norm's weights as a checkpoint has them: without the offset that the engine adds while loading."""
    offset = model.config.family.norm_offset
    return (norm - offset if offset else norm).to(model.dtype)

"""A transformers model over the LLaMA engine's weights, for beam search without a second copy of them in memory."""

import itertools
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alpaca.architecture.families import HEAD_NORMS
from alpaca.architecture.tensors import hf_name
from alpaca.formats.hf.loading import keep_score_cap
from alpaca.serving.kernels.linear_base import Linear, PlainLinear
from alpaca.serving.llama.network import LlamaLayer, LlamaModel


def as_transformers(model: LlamaModel, folder: Path, *, with_adapters: bool = False) -> PreTrainedModel | None:
    """The engine's model as one of transformers that holds no weights of its own; None where that cannot be.

    Linear layers that lie plain are shared as tensors. Packed and quantized ones are asked for their products, which
    PEFT's adapters cannot change. Nor are experts shared, which transformers lays end to end.
    """
    is_plain = _is_plain(model)
    if model.config.num_experts or (with_adapters and not is_plain):
        return None
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config)
    keep_score_cap(twin)
    if not is_plain:
        _borrow_linears(twin, model)
    twin.load_state_dict(_tensors(model, with_linears=is_plain), strict=True, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.device)  # its tables are in no state dict
    embedding = twin.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):  # nor is Gemma's multiplier
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=model.device)
    if any(buffer.is_meta for buffer in twin.buffers()):
        return None
    return twin.requires_grad_(False).eval()


def _is_plain(model: LlamaModel) -> bool:
    linears = [model.head, *(linear for layer in model.layers for linear in layer.linears)]
    return all(isinstance(linear.product, PlainLinear) for linear in linears)


class _Product:
    """An engine's linear layer, whose parts transformers asks for one after the other with the same input."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def columns(self, x: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Columns of the output for x [..., I]. It is computed once for all parts, and let go with the last of them."""
        if x is not self._input or self._output is None:
            self._input, self._output = x, self._linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        part = self._output[..., first:stop]
        if stop == self._linear.out_features:
            self._input = self._output = None
        return part


class _BorrowedLinear(torch.nn.Module):
    """Stands for torch.nn.Linear, and has no weights: some columns of an engine's layer."""

    def __init__(self, product: _Product, first: int, stop: int) -> None:
        super().__init__()
        self._product, self._first, self._stop = product, first, stop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product.columns(x, self._first, self._stop)


def _borrow_linears(twin: PreTrainedModel, model: LlamaModel) -> None:
    """Put the engine's linear layers in place of the twin's."""
    family, shapes = model.config.family, model.config.layer_shapes
    twin.set_submodule(hf_name("head").removesuffix(".weight"), _borrowed(model.head, [model.head.out_features])[0])
    for index, layer in enumerate(model.layers):
        for name, modules in family.fused.items():
            rows = [shapes[f"{module}.weight"][0] for module in modules]
            for module, borrowed in zip(modules, _borrowed(getattr(layer, name), rows), strict=True):
                twin.set_submodule(f"{family.prefix}{index}.{module}", borrowed)


def _borrowed(linear: Linear, rows: list[int]) -> list[_BorrowedLinear]:
    product, stops = _Product(linear), list(itertools.accumulate(rows))
    return [_BorrowedLinear(product, stop - size, stop) for size, stop in zip(rows, stops, strict=True)]


def _tensors(model: LlamaModel, *, with_linears: bool) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in a checkpoint."""
    tensors = {hf_name("embedding"): model.embedding, hf_name("norm"): _stored_norm(model.norm, model)}
    if with_linears:
        tensors[hf_name("head")] = model.head.weight
    for index, layer in enumerate(model.layers):
        prefix = f"{model.config.family.prefix}{index}."
        own = _layer_norms(layer, model) | (_layer_linears(layer, model) if with_linears else {})
        tensors |= {f"{prefix}{name}": tensor for name, tensor in own.items()}
    return tensors


def _layer_norms(layer: LlamaLayer, model: LlamaModel) -> dict[str, torch.Tensor]:
    norms = {name: _stored_norm(getattr(layer, place), model) for place, name in model.config.family.norms.items()}
    return {f"{name}.weight": norm for name, norm in {**norms, **_head_norms(layer, model)}.items()}


def _layer_linears(layer: LlamaLayer, model: LlamaModel) -> dict[str, torch.Tensor]:
    """A layer's matrices and biases by their names in it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, modules in model.config.family.fused.items():
        linear = getattr(layer, name)
        rows = [model.config.layer_shapes[f"{module}.weight"][0] for module in modules]
        tensors |= {
            f"{module}.weight": part for module, part in zip(modules, linear.product.weight.split(rows), strict=True)
        }
        if linear.bias is not None:
            tensors |= {f"{m}.bias": part for m, part in zip(modules, linear.bias.split(rows), strict=True)}
    return tensors


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

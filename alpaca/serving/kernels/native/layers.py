"""All layers of a model as one call of C++: the same numbers as op by op, without Python and its threads in between."""

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch

from alpaca.serving.kernels.cpu_linear import NativeLinear
from alpaca.serving.kernels.experts import Experts
from alpaca.serving.kernels.linear_base import Linear
from alpaca.serving.kernels.native.library import load
from alpaca.serving.kernels.native.ops import ACTIVATIONS, require_blocks
from alpaca.serving.kernels.native.structures import (
    ExpertsFields,
    HeadNormFields,
    LayerFields,
    ModelFields,
    StepFields,
    WeightFields,
    address,
)
from alpaca.serving.kernels.ops import AttentionBatch


class Config(Protocol):
    """What is needed of a model's description."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    norm_eps: float
    attention_scale: float
    attention_softcap: float
    residual_multiplier: float


class Layer(Protocol):
    """A decoder layer, as `llama.network` has it."""

    input_norm: torch.Tensor | None
    ffn_norm: torch.Tensor | None
    attention_post_norm: torch.Tensor | None
    ffn_post_norm: torch.Tensor | None
    qkv: Linear
    attention_out: Linear
    gate_up: Linear | None
    down: Linear | None
    experts: Experts | None
    head_norms: tuple[tuple[int, torch.Tensor], ...]
    rotary: torch.Tensor
    window: int


class Cache(Protocol):
    """Keys and values of each layer."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]


class NativeLayers:
    """The layers and the last norm of one model. It knows addresses, and so keeps what they are of."""

    def __init__(self, layers: Sequence[Layer], norm: torch.Tensor, config: Config, *, activation: str) -> None:
        routers = [None if layer.experts is None else NativeLinear(layer.experts.router) for layer in layers]
        self._kept = layers, norm, routers
        fields = (_layer_fields(layer, router) for layer, router in zip(layers, routers, strict=True))
        self._layers = (LayerFields * len(layers))(*fields)
        self._fields = ModelFields(
            layers=self._layers, norm=address(norm), num_layers=len(layers), width=config.width,
            num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_width=config.head_width,
            activation=ACTIVATIONS[activation], eps=config.norm_eps, scale=config.attention_scale,
            softcap=config.attention_softcap,
            residual_multiplier=config.residual_multiplier,
        )  # fmt: skip
        self._room = load().step_room(ctypes.byref(self._fields))
        self._cache: Cache | None = None

    def run(
        self,
        stream: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        attention: AttentionBatch,
        cache: Cache,
    ) -> torch.Tensor:
        """Hidden states [N, D] after the last norm, of embeddings [N, D], which are changed."""
        if cache is not self._cache:
            require_blocks(cache.keys[0])
            self._cache = cache
            self._keys, self._values = _addresses(cache.keys), _addresses(cache.values)
        tables, out = attention.block_tables.contiguous(), torch.empty(stream.shape)
        room = torch.empty(stream.shape[0] * self._room)
        step = StepFields(
            stream=address(stream), out=address(out), keys=ctypes.addressof(self._keys),
            values=ctypes.addressof(self._values), positions=address(positions), slots=address(slot_mapping),
            tables=address(tables), lengths=address(attention.seq_lens), starts=address(attention.query_starts),
            num_rows=stream.shape[0], num_sequences=tables.shape[0], table_stride=tables.shape[1], room=address(room),
        )  # fmt: skip
        load().run_step(ctypes.byref(self._fields), ctypes.byref(step))
        return out


def whole_layers(
    layers: Sequence[Layer], norm: torch.Tensor, config: Config, *, activation: str
) -> NativeLayers | None:
    """Layers as one call; None where some part of them is not made for that: nf4, odd widths."""
    linears = [linear for layer in layers for linear in _linears(layer)]
    if not all(isinstance(linear.product, NativeLinear) for linear in linears):
        return None
    if len({layer.experts is None for layer in layers}) > 1:  # one room for the choices of all layers
        return None
    widths = [config.width, *(linear.in_features for linear in linears)]
    widths += [weight.shape[1] for layer in layers for _, weight in layer.head_norms]
    if any(width % load().lanes() for width in widths):
        return None
    return NativeLayers(layers, norm, config, activation=activation)


def _linears(layer: Layer) -> list[Linear]:
    experts = [] if layer.experts is None else [*layer.experts.gate_up, *layer.experts.down]
    every = [layer.qkv, layer.attention_out, layer.gate_up, layer.down, *experts]
    return [linear for linear in every if linear is not None]


def _layer_fields(layer: Layer, router: NativeLinear | None) -> LayerFields:
    norms = [
        HeadNormFields(first=first, groups=weight.shape[0], width=weight.shape[1], weight=address(weight))
        for first, weight in layer.head_norms
    ]
    fields = LayerFields(
        input_norm=address(layer.input_norm), ffn_norm=address(layer.ffn_norm),
        attention_post_norm=address(layer.attention_post_norm), ffn_post_norm=address(layer.ffn_post_norm),
        qkv=_weight_fields(layer.qkv), attention_out=_weight_fields(layer.attention_out),
        head_norms=(HeadNormFields * 2)(*norms), num_head_norms=len(norms),
        rotary=address(layer.rotary), turned=layer.rotary.shape[1], window=layer.window,
    )  # fmt: skip
    if layer.experts is None:
        fields.gate_up, fields.down = _weight_fields(layer.gate_up), _weight_fields(layer.down)
    else:
        fields.experts = _experts_fields(layer.experts, router)
    return fields


def _experts_fields(experts: Experts, router: NativeLinear) -> ExpertsFields:
    number = len(experts.gate_up)
    return ExpertsFields(
        router=router.fields(), gate_up=(WeightFields * number)(*map(_weight_fields, experts.gate_up)),
        down=(WeightFields * number)(*map(_weight_fields, experts.down)), number=number, per_row=experts.per_token,
        normalizes=experts.normalizes,
    )  # fmt: skip


def _weight_fields(linear: Linear) -> WeightFields:
    return linear.product.fields(linear.bias)


def _addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))

"""The LLaMA network over packed tokens and a key/value cache in blocks: rotary table, weights, and the forward pass.

Legend: N packed tokens of a step, R rows that are sampled, D width, H heads, K key/value heads, d head width, F
feed-forward width, V vocabulary, L layers, B blocks of the cache.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.rope import Rope
from alpaca.serving.kernels.experts import Experts, mix_experts
from alpaca.serving.kernels.linear_base import Linear, PlainLinear
from alpaca.serving.kernels.low_rank import AdapterRows, LowRankStack
from alpaca.serving.kernels.native import ops as native_ops
from alpaca.serving.kernels.native.layers import NativeLayers, whole_layers
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.step import StepFields

# The gates that are computed here, by transformers' names, and by which formula.
ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "tanh", "gelu_python_tanh": "tanh",
    "gelu_new": "tanh", "gelu_fast": "tanh",
}  # fmt: skip

# Rotary embedding -----------------------------------------------------------------------------------------------


def rotary_frequencies(config: ModelDescription, rope: Rope | None = None, *, is_long: bool = False) -> torch.Tensor:
    """The angle per position of each pair of a head that turns, [r/2] float32, rescaled as the rope says."""
    rope = rope or config.rope
    r = rope.width(config.head_width)
    frequencies = 1.0 / rope.theta ** (torch.arange(0, r, 2, dtype=torch.int64).float() / r)
    return rope.scale(frequencies, is_long=is_long)


def rotary_table(
    config: ModelDescription, num_positions: int, dtype: torch.dtype, rope: Rope | None = None
) -> torch.Tensor:
    """[rows, r]: cosines of each position's angles, then sines; computed in float32, as transformers does.

    There are `num_positions` rows; where long sequences turn otherwise (longrope) as many again, for those.
    """
    rope = rope or config.rope
    positions = torch.arange(num_positions).float()
    tables = []
    for is_long in (False, True) if rope.long_from else (False,):
        angles = torch.outer(positions, rotary_frequencies(config, rope, is_long=is_long))
        tables.append(torch.cat([angles.cos(), angles.sin()], dim=-1) * rope.table_factor)
    table = torch.cat(tables)
    return table.to(dtype) if dtype == torch.float64 else table


# The network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LlamaLayer:
    """The weights of one decoder layer. Projections of the same input are one linear layer. None: it has no such norm.

    head_norms: of query and key, for each its first column in qkv's output and its weight [groups, width].
    rotary: [rows, r], of this layer's heads; r is 0 where they do not turn.    window: tokens that it sees; 0: all.
    """

    input_norm: torch.Tensor | None  # [D]
    qkv: Linear  # D -> (H + 2K) d
    attention_out: Linear  # H d -> D
    ffn_norm: torch.Tensor | None  # [D]
    rotary: torch.Tensor
    gate_up: Linear | None = None  # D -> 2F
    down: Linear | None = None  # F -> D
    experts: Experts | None = None  # in place of these two
    head_norms: tuple[tuple[int, torch.Tensor], ...] = ()
    attention_post_norm: torch.Tensor | None = None  # [D], after attention and before the sum
    ffn_post_norm: torch.Tensor | None = None  # [D]
    window: int = 0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of attention and the feed-forward, without experts'."""
        every = (self.qkv, self.attention_out, self.gate_up, self.down)
        return tuple(linear for linear in every if linear is not None)

    @property
    def norms(self) -> list[torch.Tensor]:
        """All norms' weights that there are."""
        around = (self.input_norm, self.attention_post_norm, self.ffn_norm, self.ffn_post_norm)
        return [norm for norm in around if norm is not None] + [weight for _, weight in self.head_norms]


class KeyValueCache:
    """Keys and values in blocks: `keys[i]` and `values[i]` are those of layer i, each [B, block_size, K, d]."""

    def __init__(
        self, config: ModelDescription, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_width)
        # Zeros, since a block's rows beyond a sequence's end are multiplied by a weight of zero, which NaN survives.
        whole = _zeros(shape, dtype, device)
        self.block_size = block_size
        self.keys = [layer[0] for layer in whole]
        self.values = [layer[1] for layer in whole]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU their memory is taken only when it is written to, while torch.zeros writes it all at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """All adapters over one model.

    names: that of adapter index 1 first.
    layers: for each layer its changed projections, by the names of FUSED.
    """

    names: tuple[str, ...]
    layers: list[dict[str, LowRankStack]]

    @property
    def num_bytes(self) -> int:
        return sum(stack.num_bytes for layer in self.layers for stack in layer.values())


@dataclass(frozen=True, kw_only=True)
class LlamaModel:
    """A LLaMA on one device. `ops` is the module with the fused operations, `ops` or `triton_ops`."""

    config: ModelDescription
    embedding: torch.Tensor  # [V, D]
    layers: list[LlamaLayer]
    norm: torch.Tensor  # [D]
    head: Linear  # D -> V
    rotary: torch.Tensor  # [rows, r]: the layers' that see all
    ops: ModuleType
    embedding_multiplier: float = 1.0
    adapters: Adapters | None = None

    @cached_property
    def whole(self) -> NativeLayers | None:
        """All layers in one call, where the operations are those in C++ and they can do that for this model."""
        if self.ops is not native_ops:
            return None
        return whole_layers(self.layers, self.norm, self.config, activation=ACTIVATIONS[self.config.activation])

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, without adapters."""
        linears = [self.head, *(linear for layer in self.layers for linear in layer.linears)]
        norms = self.norm.nbytes + sum(norm.nbytes for layer in self.layers for norm in layer.norms)
        is_shared = isinstance(self.head, PlainLinear) and self.head.weight.data_ptr() == self.embedding.data_ptr()
        table = 0 if is_shared else self.embedding.nbytes
        experts = sum(layer.experts.num_bytes for layer in self.layers if layer.experts)
        return table + norms + experts + sum(linear.num_bytes for linear in linears)

    def forward(
        self,
        token_ids: torch.Tensor,
        step: StepFields[torch.Tensor],
        attention: AttentionBatch,
        cache: KeyValueCache,
        *,
        adapters: AdapterRows | None = None,
    ) -> torch.Tensor:
        """Hidden states [N, D] after the last norm; the step's keys and values are written into the cache.

        token_ids: [N] int64. They are read here and not in `step`, where some may be unknown still.
        adapters: None if no token has one.
        """
        config, ops = self.config, self.ops
        scale, softcap = config.attention_scale, config.attention_softcap
        residual = F.embedding(token_ids, self.embedding)
        if self.embedding_multiplier != 1.0:
            residual = residual * self.embedding_multiplier
        if self.whole is not None and adapters is None:
            return self.whole.run(residual, step.positions, step.slot_mapping, attention, cache)
        first_norm = self.layers[0].input_norm
        x = residual if first_norm is None else ops.rms_norm(residual, first_norm, config.norm_eps)
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index], cache.values[index]
            qkv = self._project(index, "qkv", x, adapters)
            for column, weight in layer.head_norms:
                ops.norm_heads(qkv, weight, config.norm_eps, first=column)
            q = ops.rotate_and_store(qkv, layer.rotary, step.positions, step.slot_mapping, keys, values)
            mixed = ops.paged_attention(q, keys, values, attention, scale, window=layer.window, softcap=softcap)
            x = self._project(index, "attention_out", mixed.flatten(1), adapters)
            x, residual = self._add(x, residual, layer.attention_post_norm, layer.ffn_norm)
            if layer.experts is None:
                x = self._activate(self._project(index, "gate_up", x, adapters))
                x = self._project(index, "down", x, adapters)
            else:
                x = mix_experts(x, layer.experts, self._activate)
            is_last = index + 1 == len(self.layers)
            next_norm = self.norm if is_last else self.layers[index + 1].input_norm
            x, residual = self._add(x, residual, layer.ffn_post_norm, next_norm)
        return x

    def _add(
        self, x: torch.Tensor, residual: torch.Tensor, post_norm: torch.Tensor | None, next_norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what a part of a layer computed to the residual stream; (the next part's input, the stream), both [N, D].

        post_norm: of what is added; next_norm: of the sum.
        """
        if post_norm is not None:
            x = self.ops.rms_norm(x, post_norm, self.config.norm_eps)
        if self.config.residual_multiplier != 1.0:
            x = x * self.config.residual_multiplier
        if next_norm is None:
            total = residual + x
            return total, total
        return self.ops.add_rms_norm(x, residual, next_norm, self.config.norm_eps)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[N, 2F] -> [N, F]."""
        if self.config.activation == "silu":
            return self.ops.silu_mul(gate_up)
        return self.ops.gelu_mul(gate_up, is_exact=ACTIVATIONS[self.config.activation] == "gelu")

    def _project(self, index: int, name: str, x: torch.Tensor, adapters: AdapterRows | None) -> torch.Tensor:
        """One linear layer of layer `index`, with what each token's adapter adds to it."""
        linear: Linear = getattr(self.layers[index], name)
        if adapters is None or self.adapters is None:
            return linear(x)
        stack = self.adapters.layers[index].get(name)
        if stack is None:
            return linear(x)
        if linear.bias is None or stack.factors is None:
            return self.ops.add_low_rank(linear(x), x, stack, adapters)
        # DoRA's factors scale the product, and not the bias.
        return self.ops.add_low_rank(linear.product(x), x, stack, adapters).add_(linear.bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] of hidden states [R, D]."""
        logits = self.head(hidden)
        if self.config.logits_divisor != 1.0:
            logits.div_(self.config.logits_divisor)
        if self.config.logits_softcap:
            logits.div_(self.config.logits_softcap).tanh_().mul_(self.config.logits_softcap)
        return logits

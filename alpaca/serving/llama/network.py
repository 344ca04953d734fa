"""The LLaMA network over packed tokens and a key/value cache in blocks: rotary table, weights, and the forward pass.

Legend: N packed tokens of a step, R rows that are sampled, D width, H heads, K key/value heads, d head width, F
feed-forward width, V vocabulary, L layers, B blocks of the cache.
"""

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from alpaca.architecture.description import ModelDescription
from alpaca.serving.kernels.linear import Linear, PlainLinear
from alpaca.serving.kernels.low_rank import AdapterRows, LowRankStack
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.step import StepFields

# Rotary embedding -----------------------------------------------------------------------------------------------


def rotary_frequencies(config: ModelDescription) -> torch.Tensor:
    """The angle per position of each pair of a head, [d/2] float32, rescaled as the model's rope says."""
    d = config.head_width
    return config.rope.scale(1.0 / config.rope.theta ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d))


def rotary_table(config: ModelDescription, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_positions, d]: cosines of each position's angles, then sines; computed in float32, as transformers does."""
    angles = torch.outer(torch.arange(num_positions).float(), rotary_frequencies(config))
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return table.to(dtype) if dtype == torch.float64 else table


# The network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LlamaLayer:
    """The weights of one decoder layer. Projections of the same input are one linear layer."""

    input_norm: torch.Tensor  # [D]
    qkv: Linear  # D -> (H + 2K) d
    attention_out: Linear  # H d -> D
    ffn_norm: torch.Tensor  # [D]
    gate_up: Linear  # D -> 2F
    down: Linear  # F -> D


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
    rotary: torch.Tensor  # [positions, d]
    ops: ModuleType
    adapters: Adapters | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, without adapters."""
        linears = [self.head, *(p for layer in self.layers for p in (layer.qkv, layer.attention_out, layer.gate_up, layer.down))]  # fmt: skip  # noqa: E501
        norms = (2 * len(self.layers) + 1) * self.norm.nbytes
        is_shared = isinstance(self.head, PlainLinear) and self.head.weight.data_ptr() == self.embedding.data_ptr()
        table = 0 if is_shared else self.embedding.nbytes
        return table + norms + sum(linear.num_bytes for linear in linears)

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
        scale = config.head_width**-0.5
        residual = F.embedding(token_ids, self.embedding)
        x = ops.rms_norm(residual, self.layers[0].input_norm, config.norm_eps)
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index], cache.values[index]
            qkv = self._project(index, "qkv", x, adapters)
            q = ops.rotate_and_store(qkv, self.rotary, step.positions, step.slot_mapping, keys, values)
            mixed = ops.paged_attention(q, keys, values, attention, scale)
            x = self._project(index, "attention_out", mixed.flatten(1), adapters)
            x, residual = ops.add_rms_norm(x, residual, layer.ffn_norm, config.norm_eps)
            x = ops.silu_mul(self._project(index, "gate_up", x, adapters))
            x = self._project(index, "down", x, adapters)
            is_last = index + 1 == len(self.layers)
            next_norm = self.norm if is_last else self.layers[index + 1].input_norm
            x, residual = ops.add_rms_norm(x, residual, next_norm, config.norm_eps)
        return x

    def _project(self, index: int, name: str, x: torch.Tensor, adapters: AdapterRows | None) -> torch.Tensor:
        """One linear layer of layer `index`, with what each token's adapter adds to it."""
        y = getattr(self.layers[index], name)(x)
        if adapters is None or self.adapters is None:
            return y
        stack = self.adapters.layers[index].get(name)
        return y if stack is None else self.ops.add_low_rank(y, x, stack, adapters)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] of hidden states [R, D]."""
        return self.head(hidden)

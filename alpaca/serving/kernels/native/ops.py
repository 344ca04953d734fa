"""`ops` as C++ kernels for a CPU, for float32: the same functions, equal up to rounding.

A block of the cache lies otherwise than there: its memory is [K, block_size, d], so that what a head reads is in one
piece. What moves whole blocks does not notice. A row's result does not depend on what else is in the step.
"""

import torch

from alpaca.serving.kernels import ops
from alpaca.serving.kernels.native.library import load
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.kernels.ops import add_low_rank as add_low_rank
from alpaca.serving.kernels.ops import norm_heads as norm_heads

BLOCK_SIZE = 16
ACTIVATIONS = {"silu": 0, "gelu": 1, "tanh": 2}  # as pointwise.h numbers them


def fits(*, head_width: int, block_size: int, dtype: torch.dtype) -> bool:
    """Whether these kernels are there and take such heads."""
    library = load() if dtype == torch.float32 and block_size == BLOCK_SIZE else None
    return library is not None and head_width % library.lanes() == 0


def require_blocks(cache: torch.Tensor) -> None:
    """Raises ValueError for a cache [B, block_size, K, d] that the kernels would read as another."""
    if cache.shape[1] != BLOCK_SIZE:
        raise ValueError(f"the C++ kernels read blocks of {BLOCK_SIZE} tokens; found {cache.shape[1]}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide each row by its root mean square, then scale. x [N, D], weight [D] -> [N, D]."""
    if x.shape[1] % load().lanes():
        return ops.rms_norm(x, weight, eps)
    x, normed = x.contiguous(), torch.empty(x.shape)
    load().rms_norm(x.data_ptr(), weight.data_ptr(), normed.data_ptr(), *x.shape, eps)
    return normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x [N, D] to the residual stream [N, D]; returns (the sum's norm [N, D], the sum [N, D])."""
    if x.shape[1] % load().lanes():
        return ops.add_rms_norm(x, residual, weight, eps)
    x, total, normed = x.contiguous(), residual.clone(), torch.empty(x.shape)
    load().add_rms_norm(x.data_ptr(), weight.data_ptr(), total.data_ptr(), normed.data_ptr(), *x.shape, eps)
    return normed, total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second. [N, 2F] -> [N, F]."""
    return ops.silu_mul(gate_up) if gate_up.shape[1] // 2 % load().lanes() else _activate(gate_up, "silu")


def gelu_mul(gate_up: torch.Tensor, *, is_exact: bool) -> torch.Tensor:
    """gelu of the first half times the second: the exact one, or its approximation by tanh. [N, 2F] -> [N, F]."""
    if gate_up.shape[1] // 2 % load().lanes():
        return ops.gelu_mul(gate_up, is_exact=is_exact)
    return _activate(gate_up, "gelu" if is_exact else "tanh")


def _activate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up, out = gate_up.contiguous(), torch.empty(num_rows, width)
    load().activate_and_multiply(gate_up.data_ptr(), out.data_ptr(), num_rows, width, ACTIVATIONS[activation])
    return out


def rotate_and_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys; write keys and values into the cache. As `ops.rotate_and_store`."""
    require_blocks(key_cache)
    num_kv_heads, width = key_cache.shape[2:]
    num_rows, num_heads = qkv.shape[0], qkv.shape[1] // width - 2 * num_kv_heads
    qkv, queries = qkv.contiguous(), torch.empty(num_rows, num_heads, width)
    tensors = (qkv, cos_sin, positions, slot_mapping, queries, key_cache, value_cache)
    pointers = [tensor.data_ptr() for tensor in tensors]
    load().rotate_and_store(*pointers, num_rows, num_heads, num_kv_heads, width, cos_sin.shape[1])
    return queries


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of packed queries over paged keys and values. As `ops.paged_attention`."""
    require_blocks(key_cache)
    q, attended = q.contiguous(), torch.zeros(q.shape)
    tables = batch.block_tables.contiguous()
    tensors = (q, key_cache, value_cache, tables, batch.seq_lens, batch.query_starts, attended)
    pointers = [tensor.data_ptr() for tensor in tensors]
    num_heads, width = q.shape[1:]
    load().paged_attention(*pointers, *tables.shape, num_heads, key_cache.shape[2], width, window, scale, softcap)
    return attended

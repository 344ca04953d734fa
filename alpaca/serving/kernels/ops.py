"""The model's operations between its matrix products in plain torch: what a CPU runs, and what `triton_ops` must equal.

Legend: N packed tokens of a step, S sequences, H query heads, K key/value heads, d head width, D model width,
F feed-forward width, B blocks of the cache, P blocks of one sequence at most, block_size tokens a block. A slot is one
token's place in the cache: block number * block_size + place in the block. A group is the H // K query heads that share
a key head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.nn import functional

from alpaca.serving.kernels.low_rank import add_low_rank as add_low_rank

# Copied blocks of one attention call. Larger buffers come from mmap, and its page faults cost more than the attention.
_MOST_GATHERED_BYTES = 4 << 20
_MOST_PADDING_BYTES = 1 << 20  # copying this much costs about as much as one more call


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Which keys each packed query of one step sees.

    Sequence s owns the rows query_starts[s] to query_starts[s + 1]; they are its last positions, and causal among
    themselves. The functions of `ops` read the tensors once and keep in the batch what they found. So tensors that are
    overwritten in place, as those of a CUDA graph are, need `triton_ops`, which reads them in each call.
    """

    block_tables: torch.Tensor  # [S, P] int32
    seq_lens: torch.Tensor  # [S] int32: tokens in the cache once this step's are written; 0 marks a padding row
    query_starts: torch.Tensor  # [S + 1] int32
    max_query_len: int  # bounds, not necessarily reached
    max_seq_len: int
    _pieces: dict[tuple[int, int, int], list["_Piece"]] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True, eq=False)
class _Piece:
    """One call of attention, for s sequences of one query each, or for one sequence of n queries."""

    rows: torch.Tensor | slice | None  # which of the packed queries; None: all
    blocks: torch.Tensor  # [s * blocks of the longest], from the first that some query sees on
    num_sequences: int
    num_keys: int  # of the longest, within these blocks
    mask: torch.Tensor | None = None  # [s, 1, 1, num_keys] or [n, num_keys], True where seen
    is_causal: bool = False
    unused: torch.Tensor | None = None  # gathered tokens past their sequence's end, in [0, s * blocks * block_size)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide each row by its root mean square, then scale. x [N, D], weight [D] -> [N, D].

    Narrow types are rounded before they are scaled, as transformers' LlamaRMSNorm does; torch's own rounds once. With
    a weight in float32 they are rounded once, after the scaling, as Gemma's and OLMo 2's norms do.
    """
    if x.dtype in (torch.float32, torch.float64):
        return functional.rms_norm(x, weight.shape, weight, eps)
    normed = functional.rms_norm(x.float(), weight.shape, None, eps)
    if weight.dtype == torch.float32:
        return normed.mul_(weight).to(x.dtype)
    return normed.to(x.dtype).mul_(weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x [N, D] to the residual stream [N, D]; returns (the sum's norm [N, D], the sum [N, D])."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def norm_heads(qkv: torch.Tensor, weight: torch.Tensor, eps: float, *, first: int = 0) -> torch.Tensor:
    """Norm groups of columns of qkv [N, columns], each by itself, in place; returns qkv.

    weight [G, W]: the scales of G groups of W columns each, from column `first` on. Rounded as by `rms_norm`.
    """
    num_groups, width = weight.shape
    groups = qkv[:, first : first + num_groups * width].unflatten(1, (num_groups, width))
    wide = groups if qkv.dtype in (torch.float32, torch.float64) else groups.float()
    normed = functional.rms_norm(wide, (width,), None, eps)
    groups.copy_(normed.to(qkv.dtype if weight.dtype == qkv.dtype else wide.dtype) * weight)
    return qkv


def rotate_and_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys (Hugging Face's half-split rotary embedding); write keys and values into the cache.

    qkv [N, (H + 2K) * d], cos_sin [rows, r] (cosines, then sines), positions [N] (rows of cos_sin), slot_mapping [N],
    caches [B, block_size, K, d] -> queries [N, H, d], a view. The first r numbers of each head turn; r may be 0. Of
    several tokens with the same slot any one is kept.
    """
    num_kv_heads, width = key_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, width)
    num_rotated = heads.shape[1] - num_kv_heads
    rotated = _rotate_parts(heads[:, :num_rotated], cos_sin, positions)
    # Not index_copy_, which takes tens of microseconds where index_put_ takes a few.
    key_cache.view(-1, num_kv_heads, width).index_put_((slot_mapping,), rotated[:, num_rotated - num_kv_heads :])
    value_cache.view(-1, num_kv_heads, width).index_put_((slot_mapping,), heads[:, num_rotated:])
    return rotated[:, : num_rotated - num_kv_heads]


def _rotate_parts(heads: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """heads [N, heads, d] with their first r numbers rotated; cos_sin [rows, r]."""
    turned = cos_sin.shape[1]
    if turned == 0:
        return heads
    cos_sin = cos_sin.index_select(0, positions)[:, None]
    if turned == heads.shape[2]:
        return _rotate(heads, cos_sin)
    return torch.cat([_rotate(heads[:, :, :turned], cos_sin), heads[:, :, turned:]], dim=2)


def _rotate(heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """heads [N, heads, d], cos_sin [N, 1, d] -> [N, heads, d]; narrow types are computed in float32."""
    dtype = heads.dtype if heads.dtype == torch.float64 else torch.float32
    cos, sin = cos_sin.to(dtype).chunk(2, -1)
    first, second = heads.to(dtype).chunk(2, -1)
    rotated = torch.empty(heads.shape, dtype=dtype, device=heads.device)
    rotated_first, rotated_second = rotated.chunk(2, -1)
    torch.mul(first, cos, out=rotated_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated_second).addcmul_(first, sin)
    return rotated.to(heads.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second. [N, 2F] -> [N, F]."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate).mul_(up)


def gelu_mul(gate_up: torch.Tensor, *, is_exact: bool) -> torch.Tensor:
    """gelu of the first half times the second: the exact one, or its approximation by tanh. [N, 2F] -> [N, F]."""
    gate, up = gate_up.chunk(2, -1)
    return functional.gelu(gate, approximate="none" if is_exact else "tanh").mul_(up)


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
    """Causal attention of packed queries over paged keys and values; zeros for rows that see no key.

    q [N, H, d], caches [B, block_size, K, d] -> [N, H, d].
    window: a query sees so many keys at most, its own last; 0: all. Blocks before them are not read.
    softcap: scaled products s become softcap * tanh(s / softcap); 0: they stay.
    """
    pieces = _split_into_pieces(batch, q.shape[0], key_cache, window)
    if len(pieces) == 1 and pieces[0].rows is None:
        return _attend(q, key_cache, value_cache, pieces[0], scale, softcap)
    attended = q.new_zeros(q.shape)
    for piece in pieces:
        attended[piece.rows] = _attend(q[piece.rows], key_cache, value_cache, piece, scale, softcap)
    return attended


def _attend(
    q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, piece: _Piece, scale: float, softcap: float
) -> torch.Tensor:
    """One piece's queries [s or n, H, d] -> [s or n, H, d]."""
    num_kv_heads, width = key_cache.shape[2:]
    keys, values = _gather(key_cache, value_cache, piece)
    grouped = q.view(q.shape[0], num_kv_heads, -1, width)
    if piece.num_sequences == q.shape[0]:  # the heads of a group are the queries of one attention: [s, K, H // K, d]
        if softcap:
            return _attend_capped(grouped, keys, values, piece, scale, softcap).reshape(q.shape)
        mixed = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=piece.mask, scale=scale)
        return mixed.reshape(q.shape)
    queries = grouped.permute(1, 2, 0, 3)  # [K, H // K, n, d]; the group's keys are not copied but seen again
    if softcap:
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        mixed = _attend_capped(queries, keys, values, piece, scale, softcap)
        return mixed.permute(2, 0, 1, 3).reshape(q.shape)
    seen_again = (-1, queries.shape[1], -1, -1)
    mixed = functional.scaled_dot_product_attention(
        queries, keys.transpose(0, 1).expand(seen_again), values.transpose(0, 1).expand(seen_again),
        attn_mask=piece.mask, is_causal=piece.is_causal, scale=scale,
    )  # fmt: skip
    return mixed.permute(2, 0, 1, 3).reshape(q.shape)


def _attend_capped(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, piece: _Piece, scale: float, softcap: float
) -> torch.Tensor:
    """Attention with capped scores, which torch's has not. queries [.., n, d], keys and values [.., m, d]."""
    scores = (queries @ keys.transpose(-1, -2)).to(torch.promote_types(queries.dtype, torch.float32)) * scale
    scores = (scores / softcap).tanh_() * softcap
    mask = piece.mask
    if piece.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1).to(values.dtype) @ values


def _gather(key_cache: torch.Tensor, value_cache: torch.Tensor, piece: _Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a piece's sequences, [s, K, num_keys, d] each.

    One buffer for both: glibc returns memory to the system, for the next call to fault in again, when what is free
    exceeds twice its largest block.
    """
    blocks = key_cache.new_empty(2, len(piece.blocks), *key_cache.shape[1:])
    torch.index_select(key_cache, 0, piece.blocks, out=blocks[0])
    torch.index_select(value_cache, 0, piece.blocks, out=blocks[1])
    tokens = blocks.flatten(1, 2)
    if piece.unused is not None:  # another sequence's NaN would come through the mask: 0 * NaN is NaN
        tokens.index_fill_(1, piece.unused, 0)
    keys, values = tokens.unflatten(1, (piece.num_sequences, -1))[:, :, : piece.num_keys].transpose(2, 3)
    return keys, values


# The pieces of a step, which are found once and used by every layer


def _split_into_pieces(batch: AttentionBatch, num_rows: int, key_cache: torch.Tensor, window: int = 0) -> list[_Piece]:
    """The calls that make up the batch's attention. The batch keeps them, as every layer makes the same calls."""
    block_size = key_cache.shape[1]
    block_bytes = key_cache[0].numel() * key_cache.element_size()
    key = block_size, block_bytes, window
    if key not in batch._pieces:
        batch._pieces[key] = list(_find_pieces(batch, num_rows, block_size, block_bytes, window))
    return batch._pieces[key]


def _find_pieces(
    batch: AttentionBatch, num_rows: int, block_size: int, block_bytes: int, window: int
) -> Iterator[_Piece]:
    lengths, starts = batch.seq_lens.tolist(), batch.query_starts.tolist()
    num_queries = [end - start for start, end in pairwise(starts)]
    decoding = [s for s, length in enumerate(lengths) if length and num_queries[s] == 1]
    reach = [min(length, window + block_size) if window else length for length in lengths]  # what is copied, at most
    for group in _group_by_length(decoding, reach, block_size, block_bytes):
        yield _decode_piece(
            batch, group, [lengths[s] for s in group], [starts[s] for s in group], num_rows, block_size, window
        )
    for s, length in enumerate(lengths):
        if length and num_queries[s] > 1:
            yield _prefill_piece(batch, s, length, starts[s], num_queries[s], num_rows, block_size, window)


def _group_by_length(
    sequences: list[int], lengths: list[int], block_size: int, block_bytes: int
) -> Iterator[list[int]]:
    """Put sequences of similar length together, so that little padding is copied and no buffer grows large.

    Each group is in row order.
    """
    groups: list[list[int]] = []
    num_grouped = 0  # blocks of the last group's sequences, without padding
    for s in sorted(sequences, key=lambda s: lengths[s]):
        num_blocks = -(-lengths[s] // block_size)
        padded = (len(groups[-1]) + 1) * num_blocks if groups else 0
        too_long = padded * block_bytes > _MOST_GATHERED_BYTES
        if not groups or too_long or 2 * (padded - num_grouped - num_blocks) * block_bytes > _MOST_PADDING_BYTES:
            groups.append([])
            num_grouped = 0
        groups[-1].append(s)
        num_grouped += num_blocks
    return (sorted(group) for group in groups)


def _decode_piece(
    batch: AttentionBatch,
    sequences: list[int],
    lengths: list[int],
    first_rows: list[int],
    num_rows: int,
    block_size: int,
    window: int,
) -> _Piece:
    device = batch.block_tables.device
    rows = None if len(first_rows) == num_rows else torch.tensor(first_rows, device=device)
    if window and max(lengths) > window:
        return _windowed_piece(batch, sequences, lengths, rows, block_size, window)
    longest = max(lengths)
    blocks = batch.block_tables[:, : -(-longest // block_size)].index_select(0, torch.tensor(sequences, device=device))
    if min(lengths) == longest:
        return _Piece(rows, blocks.flatten(), len(sequences), longest)
    used = torch.arange(blocks.shape[1] * block_size, device=device) < torch.tensor(lengths, device=device)[:, None]
    blocks = blocks.where(used[:, ::block_size], 0)  # table entries past the end may be anything; block 0 exists
    unused = used.flatten().logical_not().nonzero().flatten()
    return _Piece(rows, blocks.flatten(), len(sequences), longest, used[:, None, None, :longest], unused=unused)


def _windowed_piece(
    batch: AttentionBatch,
    sequences: list[int],
    lengths: list[int],
    rows: torch.Tensor | None,
    block_size: int,
    window: int,
) -> _Piece:
    """Each sequence's blocks from the first on that its query sees; what it does not see in them is masked."""
    device = batch.block_tables.device
    ends = torch.tensor(lengths, device=device)
    begins = (ends - window).clamp(min=0)
    first_blocks = begins // block_size
    num_blocks = int((-(-ends // block_size) - first_blocks).max())
    places = first_blocks[:, None] + torch.arange(num_blocks, device=device)  # of blocks in their sequence
    tables = batch.block_tables[torch.tensor(sequences, device=device)]
    blocks = tables.gather(1, places.clamp(max=tables.shape[1] - 1)).where(places * block_size < ends[:, None], 0)
    tokens = first_blocks[:, None] * block_size + torch.arange(num_blocks * block_size, device=device)
    seen = (tokens >= begins[:, None]) & (tokens < ends[:, None])
    unused = seen.flatten().logical_not().nonzero().flatten()
    return _Piece(rows, blocks.flatten(), len(sequences), num_blocks * block_size, seen[:, None, None], unused=unused)


def _prefill_piece(
    batch: AttentionBatch,
    sequence: int,
    length: int,
    start: int,
    num_queries: int,
    num_rows: int,
    block_size: int,
    window: int,
) -> _Piece:
    device = batch.block_tables.device
    rows = None if num_queries == num_rows else slice(start, start + num_queries)
    last_seen = torch.arange(length - num_queries, length, device=device)
    if not window or length <= window:
        blocks = batch.block_tables[sequence, : -(-length // block_size)]
        if num_queries == length:
            return _Piece(rows, blocks, 1, length, is_causal=True)
        return _Piece(rows, blocks, 1, length, torch.arange(length, device=device) <= last_seen[:, None])
    first_block = max(length - num_queries - window + 1, 0) // block_size
    blocks = batch.block_tables[sequence, first_block : -(-length // block_size)]
    tokens = torch.arange(first_block * block_size, length, device=device)
    mask = (tokens <= last_seen[:, None]) & (tokens > last_seen[:, None] - window)
    return _Piece(rows, blocks, 1, len(tokens), mask)

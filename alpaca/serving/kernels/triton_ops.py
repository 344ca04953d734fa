"""`ops` as Triton kernels for NVIDIA GPUs: the same functions, equal up to rounding.

All of them may be captured in a CUDA graph: no launch depends on what a tensor holds, so lengths, tables and positions
may change between replays. Legend: as in `ops`.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.kernels.triton_low_rank import add_low_rank as add_low_rank

_MAX_SPLITS = 32
_LEAST_SPLIT_TOKENS = 128  # below it, the second launch costs more than idle multiprocessors
_PROGRAMS_PER_SM = 4  # loads in flight that fill the memory's bandwidth
_SM_COUNT_WITHOUT_GPU = 132  # an H100's, for Triton's interpreter


# Norms and activation


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide each row by its root mean square, then scale. x [N, D], weight [D] -> [N, D]."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, x, weight, normed, normed, eps, adds_residual=False)
    return normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x [N, D] to the residual stream [N, D]; returns (the sum's norm [N, D], the sum [N, D])."""
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_rms_norm(x, residual, weight, normed, total, eps, adds_residual=True)
    return normed, total


def _launch_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    normed: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    *,
    adds_residual: bool,
) -> None:
    num_rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_rows,)](
        x, residual, weight, normed, total, x.stride(0), residual.stride(0), eps,
        width=width, block=block, adds_residual=adds_residual, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, normed, total, x_stride, residual_stride, eps,
    width: tl.constexpr, block: tl.constexpr, adds_residual: tl.constexpr,
):  # fmt: skip
    """One row. The normed row is rounded before it is scaled, unless the weight is float32, as in transformers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if adds_residual:
        values += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    scales = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = _scale(values * inverse, scales, weight.dtype.element_ty, normed.dtype.element_ty)
    tl.store(normed + row * width + columns, scaled, mask=inside)


@triton.jit
def _scale(values, scales, weight_type: tl.constexpr, out_type: tl.constexpr):
    """Scaled values in the output's type. A weight of another type, float32, is multiplied by before the rounding."""
    if weight_type == out_type:
        values = values.to(out_type).to(tl.float32)
    return (values * scales).to(out_type)


def norm_heads(qkv: torch.Tensor, weight: torch.Tensor, eps: float, *, first: int = 0) -> torch.Tensor:
    """Norm groups of columns of qkv [N, columns], each by itself, in place; returns qkv.

    weight [G, W]: the scales of G groups of W columns each, from column `first` on. Rounded as by `rms_norm`.
    """
    assert qkv.stride(1) == 1
    assert weight.is_contiguous()
    num_groups, width = weight.shape
    block = triton.next_power_of_2(width)
    _norm_heads_kernel[(qkv.shape[0], num_groups)](
        qkv, weight, qkv.stride(0), first, eps, width=width, block=block, num_warps=min(max(block // 512, 1), 16)
    )
    return qkv


@triton.jit
def _norm_heads_kernel(qkv, weight, stride, first, eps, width: tl.constexpr, block: tl.constexpr):
    """One group of one row, in place."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, block)
    inside = columns < width
    place = qkv + row * stride + first + group * width + columns
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    scales = tl.load(weight + group * width + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = _scale(values * inverse, scales, weight.dtype.element_ty, qkv.dtype.element_ty)
    tl.store(place, scaled, mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second. [N, 2F] -> [N, F]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(width), 1024)
    _silu_mul_kernel[(num_rows, triton.cdiv(width, block))](
        gate_up, product, gate_up.stride(0), width=width, block=block, num_warps=4
    )
    return product


@triton.jit
def _silu_mul_kernel(gate_up, product, stride, width: tl.constexpr, block: tl.constexpr):
    """`block` columns of one row. The silu is rounded before the product, as in torch."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(product.dtype.element_ty).to(tl.float32)
    tl.store(product + row * width + columns, (silu * up).to(product.dtype.element_ty), mask=inside)


def gelu_mul(gate_up: torch.Tensor, *, is_exact: bool) -> torch.Tensor:
    """gelu of the first half times the second: the exact one, or its approximation by tanh. [N, 2F] -> [N, F]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(width), 1024)
    _gelu_mul_kernel[(num_rows, triton.cdiv(width, block))](
        gate_up, product, gate_up.stride(0), width=width, block=block, is_exact=is_exact, num_warps=4
    )
    return product


@triton.jit
def _gelu_mul_kernel(
    gate_up, product, stride, width: tl.constexpr, block: tl.constexpr, is_exact: tl.constexpr
):  # fmt: skip
    """`block` columns of one row. The gelu is rounded before the product, as in torch."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    if is_exact:
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        share = 0.5 * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    gelu = (gate * share).to(product.dtype.element_ty).to(tl.float32)
    tl.store(product + row * width + columns, (gelu * up).to(product.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    """tanh in float32 by one exponential of a number below 0, which cannot overflow."""
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


# Rotary embedding and the cache's writes


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
    caches [B, block_size, K, d] -> queries [N, H, d]. The first r numbers of each head turn; r may be 0. Of several
    tokens with the same slot any one is kept.
    """
    assert all(tensor.is_contiguous() for tensor in (cos_sin, key_cache, value_cache))
    num_kv_heads, width = key_cache.shape[2:]
    num_heads = qkv.shape[1] // width - 2 * num_kv_heads
    q = torch.empty(qkv.shape[0], num_heads, width, dtype=qkv.dtype, device=qkv.device)
    block_heads, turned = 8, cos_sin.shape[1]
    _rotate_and_store_kernel[(qkv.shape[0], triton.cdiv(num_heads + 2 * num_kv_heads, block_heads))](
        qkv, cos_sin, positions, slot_mapping, q, key_cache, value_cache, qkv.stride(0),
        num_heads=num_heads, num_kv_heads=num_kv_heads, half=turned // 2, width=width, block_heads=block_heads,
        block_half=triton.next_power_of_2(max(turned // 2, 1)),
        block_rest=triton.next_power_of_2(max(width - turned, 1)), num_warps=2,
    )  # fmt: skip
    return q


@triton.jit
def _rotate_and_store_kernel(
    qkv, cos_sin, positions, slot_mapping, q, key_cache, value_cache, stride,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, half: tl.constexpr, width: tl.constexpr,
    block_heads: tl.constexpr, block_half: tl.constexpr, block_rest: tl.constexpr,
):  # fmt: skip
    """Handles a few heads of one token. Masks tell queries, keys and values apart."""
    first_value: tl.constexpr = num_heads + num_kv_heads
    row = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * block_heads + tl.arange(0, block_heads))[:, None]
    turned = heads < first_value
    is_query, is_key = heads < num_heads, (heads >= num_heads) & turned
    is_value = (heads >= first_value) & (heads < first_value + num_kv_heads)
    place = tl.load(slot_mapping + row).to(tl.int64) * (num_kv_heads * width)
    queries = q + row * (num_heads * width)
    keys, values = key_cache + place - num_heads * width, value_cache + place - first_value * width
    if half > 0:
        columns = tl.arange(0, block_half)[None, :]
        in_half = columns < half
        inside = in_half & (heads < first_value + num_kv_heads)
        offsets = heads * width + columns
        first = tl.load(qkv + row * stride + offsets, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(qkv + row * stride + offsets + half, mask=inside, other=0.0).to(tl.float32)
        angles = cos_sin + tl.load(positions + row).to(tl.int64) * (2 * half) + columns
        cos = tl.where(turned, tl.load(angles, mask=in_half, other=0.0).to(tl.float32), 1.0)
        sin = tl.where(turned, tl.load(angles + half, mask=in_half, other=0.0).to(tl.float32), 0.0)
        new_first = (first * cos - second * sin).to(q.dtype.element_ty)
        new_second = (second * cos + first * sin).to(q.dtype.element_ty)
        _store_halves(queries + offsets, new_first, new_second, in_half & is_query, half)
        _store_halves(keys + offsets, new_first, new_second, in_half & is_key, half)
        _store_halves(values + offsets, new_first, new_second, in_half & is_value, half)
    if width > 2 * half:  # numbers that do not turn
        columns = 2 * half + tl.arange(0, block_rest)[None, :]
        in_rest = columns < width
        offsets = heads * width + columns
        kept = tl.load(qkv + row * stride + offsets, mask=in_rest & (is_query | is_key | is_value), other=0.0)
        tl.store(queries + offsets, kept, mask=in_rest & is_query)
        tl.store(keys + offsets, kept, mask=in_rest & is_key)
        tl.store(values + offsets, kept, mask=in_rest & is_value)


@triton.jit
def _store_halves(pointers, first, second, mask, half: tl.constexpr):
    tl.store(pointers, first, mask=mask)
    tl.store(pointers + half, second, mask=mask)


# Attention


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries over paged keys and values; zeros for rows that see no key.

    q [N, H, d], caches [B, block_size, K, d] -> [N, H, d]. The launch depends on the batch's shapes and two bounds.
    window: a query sees so many keys at most, its own last; 0: all. Keys before them are not read.
    softcap: scaled products s become softcap * tanh(s / softcap); 0: they stay.
    `num_splits` programs share a sequence's keys; None: enough to fill the device.
    """
    assert all(tensor.is_contiguous() for tensor in (q[0], key_cache, value_cache))
    num_rows, num_heads, width = q.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    group, num_sequences, one_query = num_heads // num_kv_heads, batch.seq_lens.shape[0], batch.max_query_len == 1
    block_rows, block_keys, num_warps = _choose_blocks(width, q.element_size(), group, one_query=one_query)
    tile_tokens = 1 if one_query else block_rows // group
    num_tiles = num_sequences if one_query else num_rows // tile_tokens + num_sequences
    most_keys = min(batch.max_seq_len, window + tile_tokens) if window else batch.max_seq_len
    splits = num_splits or choose_num_splits(num_tiles * num_kv_heads, most_keys, _count_sms(q.device))
    attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partials, lses = attended, attended
    if splits > 1:
        partials = torch.empty(num_rows, num_heads, splits, width, dtype=torch.float32, device=q.device)
        lses = torch.empty(num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
    _attention_kernel[(num_kv_heads, num_tiles, splits)](
        q, key_cache, value_cache, batch.block_tables, batch.seq_lens, batch.query_starts, partials, lses,
        num_sequences, num_rows, q.stride(0), batch.block_tables.stride(0),
        scale / softcap if softcap else scale * math.log2(math.e), (softcap or 1.0) * math.log2(math.e),
        num_kv_heads=num_kv_heads, group=group, width=width, block_size=block_size, block_rows=block_rows,
        block_keys=block_keys, block_width=_pad_width(width), tile_tokens=tile_tokens, one_query=one_query,
        is_split=splits > 1, window=window, is_capped=softcap > 0, num_warps=num_warps, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_rows, num_heads)](
            partials, lses, batch.query_starts, attended, num_sequences, splits,
            num_heads=num_heads, width=width, block_splits=_MAX_SPLITS, block_width=_pad_width(width), num_warps=4,
        )  # fmt: skip
    return attended


def _choose_blocks(width: int, element_size: int, group: int, *, one_query: bool) -> tuple[int, int, int]:
    """Rows of a tile, keys of a step, warps: as large as Triton 3.6 compiles for sm_90 without spilling registers.

    A tile has the rows of one whole group at least (beyond 64 heads to a group some registers may be spilled). Three
    stages keep one step's keys and values under way while the one before is used: block numbers are a stage ahead.
    """
    least = max(triton.next_power_of_2(group), 16)
    if element_size == 4:  # no tensor cores: float32 is multiplied as float32
        return (least if one_query else max(64 if width <= 64 else 32, least)), 16, 8
    rows = least if one_query else max(64, least)
    return rows, (64 if width <= 128 else 32), (8 if width > 128 and not one_query else 4)


def choose_num_splits(num_programs: int, max_seq_len: int, num_sms: int) -> int:
    """How many programs share one sequence's keys, so that `num_programs` times as many fill the device."""
    wanted = _PROGRAMS_PER_SM * num_sms // num_programs
    return max(min(wanted, max_seq_len // _LEAST_SPLIT_TOKENS, _MAX_SPLITS), 1)


@cache
def _count_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _SM_COUNT_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pad_width(width: int) -> int:
    """tl.dot wants powers of two, 16 at least."""
    return max(triton.next_power_of_2(width), 16)


# Numbers that vary from step to step are not specialised: each special case would be a compilation while serving.
@triton.jit(do_not_specialize=["num_sequences", "num_rows", "table_stride"])
def _attention_kernel(
    q, key_cache, value_cache, block_tables, seq_lens, query_starts, partials, lses,
    num_sequences, num_rows, q_stride, table_stride, scale, cap_log2,
    num_kv_heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, block_size: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr, block_width: tl.constexpr,
    tile_tokens: tl.constexpr, one_query: tl.constexpr, is_split: tl.constexpr, window: tl.constexpr,
    is_capped: tl.constexpr,
):  # fmt: skip
    """A tile (some queries of one sequence, all heads of one group) over one split of the keys they see.

    scale makes scores of base 2 of products, or, where they are capped, what the cap's tanh takes.
    Rows of the tile: token * group + head in the group. Softmax in base 2, running maximum and sum in float32. The
    result goes to partials [N, H, splits, d], which is the output itself where there is one split.
    """
    kv_head = tl.program_id(0)  # neighbouring programs read neighbouring memory: a token's heads lie together
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    num_heads: tl.constexpr = num_kv_heads * group
    columns = tl.arange(0, block_width)
    if not is_split:
        _zero_rows_without_sequence(
            partials, query_starts, num_sequences, num_rows, kv_head, num_heads, group, width, block_width
        )
    sequence, first_token = _find_tile(query_starts, num_sequences, tile_tokens, one_query)
    start = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - start
    if first_token >= num_queries:
        return

    rows = tl.arange(0, block_rows)
    tokens = first_token + rows // group
    is_query = (rows < tile_tokens * group) & (tokens < num_queries)
    heads = kv_head * group + rows % group
    packed = (start + tokens).to(tl.int64)
    in_width = columns < width
    is_output = is_query[:, None] & in_width[None, :]
    queries = tl.load(q + (packed * q_stride + heads * width)[:, None] + columns[None, :], mask=is_output, other=0.0)

    num_unseen = tl.maximum(num_queries - first_token - tile_tokens, 0)  # keys after the tile's last query
    seq_len = tl.load(seq_lens + sequence)
    last_seen = seq_len - num_queries + tokens
    num_keys = tl.maximum(seq_len - num_unseen, 0)
    lowest = num_keys * 0  # the first key that the tile's first query sees
    if window > 0:
        lowest = tl.maximum(seq_len - num_queries + first_token - window + 1, 0)
    first_step = lowest // block_keys * block_keys
    split_keys = tl.cdiv(tl.cdiv(num_keys - first_step, num_splits), block_keys) * block_keys
    begin = first_step + split * split_keys
    end = tl.minimum(begin + split_keys, num_keys)

    highest = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    mixed = tl.zeros([block_rows, block_width], tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    for first_key in range(begin, end, block_keys):
        keys = first_key + tl.arange(0, block_keys)
        in_split = keys < end
        if window > 0:  # blocks before the window may be another sequence's by now
            in_split = in_split & (keys >= lowest)
        blocks = tl.load(table + keys // block_size, mask=in_split, other=0).to(tl.int64)
        places = (blocks * block_size + keys % block_size) * (num_kv_heads * width) + kv_head * width
        inside = in_split[:, None] & in_width[None, :]
        key_block = tl.load(
            key_cache + places[None, :] + columns[:, None], mask=in_split[None, :] & in_width[:, None], other=0.0
        )
        value_block = tl.load(value_cache + places[:, None] + columns[None, :], mask=inside, other=0.0)
        scores = tl.dot(queries, key_block, input_precision="ieee") * scale
        if is_capped:
            scores = _tanh(scores) * cap_log2
        # A split ends at a whole block or at the tile's last key, so that no query's last_seen lies past its end.
        is_seen = keys[None, :] <= last_seen[:, None]
        if window > 0:
            is_seen = is_seen & (keys[None, :] > last_seen[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(value_block.dtype)
        mixed = tl.dot(weights, value_block, mixed * shrink[:, None], input_precision="ieee")
        highest = new_highest

    seen_any = total > 0.0
    divisor = tl.where(seen_any, total, 1.0)
    outputs = (packed * num_heads + heads) * num_splits + split
    mixed = (mixed / divisor[:, None]).to(partials.dtype.element_ty)
    tl.store(partials + outputs[:, None] * width + columns[None, :], mixed, mask=is_output)
    if is_split:
        lse = tl.where(seen_any, highest + tl.log2(divisor), float("-inf"))
        tl.store(lses + outputs, lse, mask=is_query)


@triton.jit
def _find_tile(query_starts, num_sequences, tile_tokens: tl.constexpr, one_query: tl.constexpr):
    """This program's sequence, and its first query there.

    Sequence s has its tiles from query_starts[s] // tile_tokens + s on: never fewer than it needs, and one too many
    at most. So the grid needs only N and S, and s is found by counting the sequences that begin at or before the tile.
    """
    tile = tl.program_id(1)
    sequence = tile
    first_token = tile * 0
    if not one_query:
        count = tile * 0
        for first in range(0, num_sequences, 128):
            others = first + tl.arange(0, 128)
            exists = others < num_sequences
            first_tiles = tl.load(query_starts + others, mask=exists, other=0) // tile_tokens + others
            count += tl.sum((exists & (first_tiles <= tile)).to(tl.int32), axis=0)
        sequence = count - 1
        first_tile = tl.load(query_starts + sequence) // tile_tokens + sequence
        first_token = (tile - first_tile) * tile_tokens
    return sequence, first_token


@triton.jit
def _zero_rows_without_sequence(
    attended, query_starts, num_sequences, num_rows, kv_head,
    num_heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Rows after the last sequence's are padding of the step; the programs share them."""
    columns = tl.arange(0, block_width)
    used = tl.load(query_starts + num_sequences)
    for row in range(used + tl.program_id(1), num_rows, tl.num_programs(1)):
        for member in range(group):
            place = (row * num_heads + kv_head * group + member) * width
            zeros = tl.zeros([block_width], attended.dtype.element_ty)
            tl.store(attended + place + columns, zeros, mask=columns < width)


@triton.jit(do_not_specialize=["num_sequences", "num_splits"])
def _combine_kernel(
    partials, lses, query_starts, attended, num_sequences, num_splits,
    num_heads: tl.constexpr, width: tl.constexpr, block_splits: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One head of one row: the splits' results, weighted by their share of the softmax's sum."""
    row = tl.program_id(0).to(tl.int64)
    output = row * num_heads + tl.program_id(1)
    splits = tl.arange(0, block_splits)
    columns = tl.arange(0, block_width)
    in_width = columns < width
    written = (splits < num_splits) & (row < tl.load(query_starts + num_sequences))
    lse = tl.load(lses + output * num_splits + splits, mask=written, other=float("-inf"))
    seen = lse > float("-inf")
    highest = tl.max(lse, axis=0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(lse - reference)
    parts = tl.load(
        partials + (output * num_splits + splits)[:, None] * width + columns[None, :],
        mask=seen[:, None] & in_width[None, :], other=0.0,
    )  # fmt: skip
    total = tl.sum(weights, axis=0)
    mixed = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(attended + output * width + columns, mixed.to(attended.dtype.element_ty), mask=in_width)

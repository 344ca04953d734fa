"""How Meta splits a tensor over files, and the rotary permutation: parts put together, and taken apart again.

Meta's model parallelism (fairscale) splits a ColumnParallelLinear on its output (rows of the weight, axis 0) and a
RowParallelLinear on its input (axis 1); Meta's embedding is split on its width (axis 1), Llama 3's on its vocabulary
(axis 0). With more shards than key/value heads (Llama 3.1 405B on 16) neighbouring shards hold the same head. Where
embedding and head are one matrix (Llama 3.2) there is no head to write. Meta rotates adjacent pairs (x0, x1), Hugging
Face the two halves of a head (x[:d/2], x[d/2:]), so the rows of wq and wk are reordered within each head on the way.
"""

import math
from collections.abc import Iterator, Mapping

import torch

from alpaca.errors import InputError
from alpaca.formats.meta.layout import Placement, shard_shape

_BLOCK_BYTES = 4 << 20  # small enough to stay in the processor's cache between reading and writing


def row_blocks(placement: Placement, parts: list[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The whole tensor in Hugging Face's order, as consecutive blocks of rows of about 4 MiB.

    A block may lie in memory that the next one overwrites, so that no more than one is ever held.
    """
    if placement.split_axis == 1:
        yield from _blocks_side_by_side(parts, dtype)
        return
    sources = _distinct_parts(placement, parts) if placement.split_axis == 0 else parts[:1]
    for part in sources:
        if placement.num_rotary_heads is not None:
            part = rotary_halves(part, placement.num_rotary_heads // len(sources))
        yield from _blocks_side_by_side([part], dtype)


def _distinct_parts(placement: Placement, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """One of each group of shards that hold the same key/value head. Raises InputError where they do not."""
    heads = placement.num_kv_heads
    if heads is None or len(parts) <= heads:
        return parts
    step = len(parts) // heads
    for number, part in enumerate(parts):
        if number % step and not torch.equal(part, parts[number - number % step]):
            raise InputError(
                f"{placement.meta_name!r}: shards {number - number % step} and {number} should hold the same key/value "
                f"head ({heads} heads in params.json, {len(parts)} shards) and differ; are they of one checkpoint?"
            )
    return parts[::step]


def are_equal(first: Placement, second: Placement, shards: list[Mapping[str, torch.Tensor]]) -> bool:
    """Whether two matrices of one shape hold the same values, however each is split; ends at the first difference."""
    (rows, width), matrices = first.shape, [(p, [shard[p.meta_name] for shard in shards]) for p in (first, second)]
    step = max(1, _BLOCK_BYTES // (4 * width))
    blocks = (
        [_rows(parts, place.split_axis, start, min(start + step, rows)) for place, parts in matrices]
        for start in range(0, rows, step)
    )
    return all(torch.equal(*block) for block in blocks)


def _rows(parts: list[torch.Tensor], axis: int, start: int, stop: int) -> torch.Tensor:
    if axis == 1:
        return torch.cat([part[start:stop] for part in parts], dim=1)
    size = parts[0].shape[0]
    return torch.cat([part[max(0, start - i * size) : max(0, stop - i * size)] for i, part in enumerate(parts)])


def _blocks_side_by_side(parts: list[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Blocks of the first axis of equal `parts`, joined on their last axis; views where there is nothing to do."""
    first = parts[0]
    shape = (*first.shape[:-1], first.shape[-1] * len(parts))
    step = max(1, _BLOCK_BYTES // (dtype.itemsize * math.prod(shape[1:])))
    if len(parts) == 1 and first.dtype == dtype and first.is_contiguous():
        yield from first.split(step)
        return
    block = torch.empty((min(step, shape[0]), *shape[1:]), dtype=dtype)
    for start in range(0, shape[0], step):
        target = block[: shape[0] - start]
        for part, columns in zip(parts, target.chunk(len(parts), dim=-1), strict=True):
            columns.copy_(part[start : start + step])
        yield target


def rotary_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Meta's wq or wk [H*d, D] as a view [H, 2, d/2, D]: first members of all pairs of a head, then the second.

    Flattened to [H*d, D] again these are Hugging Face's rows.
    """
    rows, width = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2)


def rotary_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Hugging Face's q or k weight [H*d, ...] as a view [H, d/2, 2, ...]: the members of each rotated pair together.

    Flattened these are Meta's rows, and llama.cpp's; the way back from `rotary_halves`.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, 2, half, *weight.shape[1:]).transpose(1, 2)


def metas_order(placement: Placement, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor in Hugging Face's order put into Meta's: the way back from `rotary_halves`; itself for most."""
    heads = placement.num_rotary_heads
    if heads is None:
        return whole
    return rotary_pairs(whole, heads).reshape(whole.shape)


def shard_part(placement: Placement, whole: torch.Tensor, rank: int, num_shards: int) -> torch.Tensor:
    """What shard `rank` of `num_shards` holds of a whole tensor in Meta's order, as a view."""
    axis = placement.split_axis
    if axis is None:
        return whole
    size = shard_shape(placement, num_shards)[axis]
    copies = size * num_shards // placement.shape[axis]  # of each key/value head, where there are fewer than shards
    return whole.narrow(axis, rank // copies * size, size)

"""`low_rank.add_low_rank` on a GPU, in two launches: rows shrink to their adapter's ranks and expand again.

Nothing is gathered or copied: a program reads the A or B of the adapter its rows have. Few rows (decoding) are taken
one by one, as every one may have another adapter and the reading of A and B is the cost; many (prompts) sixteen at a
time through the tensor cores, once for each adapter among the sixteen: the runner keeps rows of one adapter together,
so mostly once. Rows without an adapter cost next to nothing. The sums over the input are split among programs and
added up in a fixed order: the same numbers come out each time. Grids follow from shapes alone, and the adapters of the
rows are read on the device, so all of it can be recorded in a CUDA graph.

Legend: as in low_rank. Set TRITON_INTERPRET=1 before the first import of triton to run this on a CPU.
"""

import torch
import triton
import triton.language as tl

from alpaca.serving.kernels.low_rank import AdapterRows, LowRankStack

_FEW_ROWS = 64  # above, sixteen rows at a time
_ROW_TILE = 16  # the least the tensor cores take
_SPLIT = 1024  # columns of the input that one program adds up
_MOST_SPLITS = 16
_OUTPUT_TILE = 64


def add_low_rank(y: torch.Tensor, x: torch.Tensor, stack: LowRankStack, rows: AdapterRows) -> torch.Tensor:
    """Apply each row's adapter to a layer's output y [N, O], given its input x [N, I]. Changes y and returns it."""
    x = x.contiguous()
    assert y.is_contiguous()
    narrow = _shrink(x, stack, rows.adapter_indices)
    _expand(y, narrow, stack, rows.adapter_indices)
    return y


def num_splits(width: int) -> int:
    """Number of parts into which a sum over `width` columns is split."""
    return min(triton.cdiv(width, _SPLIT), _MOST_SPLITS)


def _shrink(x: torch.Tensor, stack: LowRankStack, adapter_indices: torch.Tensor) -> torch.Tensor:
    """x A^T as partial sums, [splits, N, P r] float32. Rows without an adapter hold anything; no one reads them."""
    (num_rows, width), num_ranks = x.shape, stack.a.shape[1]
    splits = num_splits(width)
    narrow = torch.empty(splits, num_rows, num_ranks, dtype=torch.float32, device=x.device)
    is_few = num_rows <= _FEW_ROWS
    row_tile, rank_tile, width_tile = (1, 8, 256) if is_few else (_ROW_TILE, 16, 64)
    split_width = triton.cdiv(triton.cdiv(width, splits), width_tile) * width_tile
    grid = (triton.cdiv(num_rows, row_tile), triton.cdiv(num_ranks, rank_tile), splits)
    _shrink_kernel[grid](
        x, stack.a, adapter_indices, narrow, num_rows, num_ranks, width=width, split_width=split_width,
        row_tile=row_tile, rank_tile=rank_tile, width_tile=width_tile, num_warps=4,
    )  # fmt: skip
    return narrow


def _expand(y: torch.Tensor, narrow: torch.Tensor, stack: LowRankStack, adapter_indices: torch.Tensor) -> None:
    """Add the ranks' outputs to y, then multiply by DoRA's factors where there are any."""
    num_rows, num_outputs = y.shape
    starts, widths = ([part[i] for part in stack.parts] + [0] * (3 - len(stack.parts)) for i in (0, 1))
    row_tile = 1 if num_rows <= _FEW_ROWS else _ROW_TILE
    rank_tile = min(max(triton.next_power_of_2(stack.rank), 16 if row_tile > 1 else 8), 64)
    grid = (triton.cdiv(num_rows, row_tile), sum(triton.cdiv(width, _OUTPUT_TILE) for width in widths))
    _expand_kernel[grid](
        y, narrow, stack.b, adapter_indices if stack.factors is None else stack.factors, adapter_indices, num_rows,
        num_outputs, *starts, *widths, rank=stack.rank, num_parts=len(stack.parts), num_splits=narrow.shape[0],
        has_factors=stack.factors is not None, row_tile=row_tile, output_tile=_OUTPUT_TILE, rank_tile=rank_tile,
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])  # or numbers of rows would be compiled apart
def _shrink_kernel(
    x, a, adapter_indices, narrow, num_rows, num_ranks,
    width: tl.constexpr, split_width: tl.constexpr, row_tile: tl.constexpr, rank_tile: tl.constexpr,
    width_tile: tl.constexpr,
):  # fmt: skip
    """`row_tile` rows times `rank_tile` rows of their adapters' A over one split of the columns."""
    rows = tl.program_id(0) * row_tile + tl.arange(0, row_tile)
    ranks = tl.program_id(1) * rank_tile + tl.arange(0, rank_tile)
    is_row, is_rank = rows < num_rows, ranks < num_ranks
    own = tl.load(adapter_indices + rows, mask=is_row, other=0)
    first = tl.program_id(2) * split_width
    starts = x + rows.to(tl.int64)[:, None] * width
    sums = tl.zeros((row_tile, rank_tile), dtype=tl.float32)
    adapter = tl.max(own)
    while adapter > 0:
        is_mine = own == adapter
        matrix = a + ((adapter - 1).to(tl.int64) * num_ranks + ranks)[:, None] * width
        for start in range(0, split_width, width_tile):
            columns = first + start + tl.arange(0, width_tile)
            inside = columns < width
            tile = tl.load(starts + columns[None, :], mask=is_mine[:, None] & inside[None, :], other=0.0)
            w = tl.load(matrix + columns[None, :], mask=is_rank[:, None] & inside[None, :], other=0.0)
            if row_tile == 1:
                sums += tl.sum(w.to(tl.float32) * tile.to(tl.float32), axis=1)[None, :]
            else:
                sums = tl.dot(tile, tl.trans(w), sums, input_precision="ieee")
        adapter = tl.max(tl.where(own < adapter, own, 0))
    to = narrow + (tl.program_id(2).to(tl.int64) * num_rows + rows)[:, None] * num_ranks + ranks[None, :]
    tl.store(to, sums, mask=is_row[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _expand_kernel(
    y, narrow, b, factors, adapter_indices, num_rows, num_outputs, start_0, start_1, start_2, width_0, width_1, width_2,
    rank: tl.constexpr, num_parts: tl.constexpr, num_splits: tl.constexpr, has_factors: tl.constexpr,
    row_tile: tl.constexpr, output_tile: tl.constexpr, rank_tile: tl.constexpr,
):  # fmt: skip
    """`output_tile` outputs of one part for `row_tile` rows. The second index of the grid counts tiles over all parts.

    Ranks are rounded to the dtype of B between the products, as the twin's are.
    """
    rows = tl.program_id(0) * row_tile + tl.arange(0, row_tile)
    is_row = rows < num_rows
    own = tl.load(adapter_indices + rows, mask=is_row, other=0)
    adapter = tl.max(own)
    if adapter > 0:
        tiles_0, tiles_1 = tl.cdiv(width_0, output_tile), tl.cdiv(width_1, output_tile)
        tile = tl.program_id(1)
        part = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
        tile -= tl.where(part > 0, tiles_0, 0) + tl.where(part > 1, tiles_1, 0)
        outputs = tile * output_tile + tl.arange(0, output_tile)
        width = tl.where(part == 0, width_0, tl.where(part == 1, width_1, width_2))
        start = tl.where(part == 0, start_0, tl.where(part == 1, start_1, start_2))
        stacked = tl.where(part > 0, width_0, 0) + tl.where(part > 1, width_1, 0) + outputs  # their rows of B
        num_stacked = width_0 + width_1 + width_2
        is_output = outputs < width
        sums = tl.zeros((row_tile, output_tile), dtype=tl.float32)
        while adapter > 0:
            is_mine = own == adapter
            matrix = b + ((adapter - 1).to(tl.int64) * num_stacked + stacked)[:, None] * rank
            for first in range(0, rank, rank_tile):
                ranks = first + tl.arange(0, rank_tile)
                inside = ranks < rank
                w = tl.load(matrix + ranks[None, :], mask=is_output[:, None] & inside[None, :], other=0.0)
                at = narrow + rows.to(tl.int64)[:, None] * (num_parts * rank) + (part * rank + ranks)[None, :]
                mask = is_mine[:, None] & inside[None, :]
                h = tl.load(at, mask=mask, other=0.0)
                for split in range(1, num_splits):
                    h += tl.load(at + split * num_rows.to(tl.int64) * (num_parts * rank), mask=mask, other=0.0)
                h = h.to(w.dtype)
                if row_tile == 1:
                    sums += tl.sum(w.to(tl.float32) * h.to(tl.float32), axis=1)[None, :]
                else:
                    sums = tl.dot(h, tl.trans(w), sums, input_precision="ieee")
            adapter = tl.max(tl.where(own < adapter, own, 0))
        to = y + rows.to(tl.int64)[:, None] * num_outputs + (start + outputs)[None, :]
        mask = (own > 0)[:, None] & is_output[None, :]
        sums += tl.load(to, mask=mask, other=0.0).to(tl.float32)
        if has_factors:
            at = factors + (own - 1).to(tl.int64)[:, None] * num_stacked + stacked[None, :]
            sums *= tl.load(at, mask=mask, other=1.0).to(tl.float32)
        tl.store(to, sums.to(y.dtype.element_ty), mask=mask)

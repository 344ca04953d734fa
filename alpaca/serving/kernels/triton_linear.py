"""Products with int8 and nf4 weights on a GPU: the bytes of the weight are read once, and never written out whole.

Decoding is bound by the reading of weights, so the kernels for few rows spend everything on that: one row is multiplied
element by element with many small programs; 2 to 64 rows go through the tensor cores. For more rows the weight is
dequantised in blocks for cuBLAS. Sums are float32. Grids and tiles follow from shapes alone, nothing waits for the
device: all of it can be recorded in a CUDA graph, once each shape has run (and been compiled) before.

Legend: N rows (packed tokens), I input width, O output width. Set TRITON_INTERPRET=1 before the first import of triton
to run this on a CPU.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from alpaca.formats.hf.quantization import INT8_STEP, NF4_VALUES, Int8Weight, Nf4Weight


def multiply_int8(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x [N, I], N up to 64, -> [N, O]."""
    num_rows, width = x.shape
    num_outputs = weight.shape[0]
    x, out = x.contiguous(), x.new_empty(num_rows, num_outputs)
    operands = (x, weight.codes, weight.absmax, out)
    if num_rows == 1:
        grid = (triton.cdiv(num_outputs, 8),)
        _int8_one_row[grid](*operands, num_outputs, INT8_STEP, width, 8, 512, num_warps=4)
    else:
        rows, outputs = _choose_tiles(num_rows, num_outputs)
        grid = (triton.cdiv(num_outputs, outputs),)
        _int8_few_rows[grid](
            *operands, num_rows, num_outputs, INT8_STEP, width, rows, outputs, 128, num_warps=4, num_stages=4
        )
    return out


def multiply_nf4(x: torch.Tensor, weight: Nf4Weight) -> torch.Tensor:
    """x [N, I], N up to 64 and I a multiple of 64, -> [N, O]."""
    num_rows, width = x.shape
    num_outputs = weight.shape[0]
    x, out = x.contiguous(), x.new_empty(num_rows, num_outputs)
    operands = (x, weight.packed, weight.absmax, _values(x.device), out)
    if num_rows == 1:
        grid = (triton.cdiv(num_outputs, 4),)
        _nf4_one_row[grid](*operands, num_outputs, width, 4, 16, num_warps=4)
    else:
        rows, outputs = _choose_tiles(num_rows, num_outputs)
        grid = (triton.cdiv(num_outputs, outputs),)
        blocks = 4 if rows == 16 else 2  # or the registers run out
        _nf4_few_rows[grid](*operands, num_rows, num_outputs, width, rows, outputs, blocks, num_warps=4, num_stages=1)
    return out


def dequantize_int8(weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, I], bit for bit as weight.dequantize."""
    num_outputs, width = weight.shape
    out = torch.empty(num_outputs, width, dtype=dtype, device=weight.codes.device)
    grid = (num_outputs, triton.cdiv(width, 1024))
    _dequantize_int8[grid](weight.codes, weight.absmax, out, width, INT8_STEP, 1024, num_warps=4)
    return out


def dequantize_nf4(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, I], bit for bit as weight.dequantize."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    grid = (triton.cdiv(out.numel(), 2048),)
    _dequantize_nf4[grid](weight.packed, weight.absmax, _values(out.device), out, out.numel(), 2048, num_warps=4)
    return out


@cache
def _values(device: torch.device) -> torch.Tensor:
    """What the 16 codes stand for, float32 [16]: half a cache line, so looking them up stays on the multiprocessor."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def _choose_tiles(num_rows: int, num_outputs: int) -> tuple[int, int]:
    """Rows of x and of the weight for one program: enough programs for every multiprocessor (132 on an H100).

    More rows of x need wider tiles of the weight, or the programs read x more often than the weight.
    """
    rows = max(16, triton.next_power_of_2(num_rows))  # the tensor cores take 16 at least
    outputs = 16 if num_outputs <= 4096 else 32
    return rows, max(outputs, rows)


@triton.jit
def _int8_one_row(
    x, codes, absmax, out, num_outputs, step, width: tl.constexpr, output_tile: tl.constexpr, width_tile: tl.constexpr
):
    """One row [I] times `output_tile` rows of the weight; each column of the tile has its own sum until the end."""
    outputs = tl.program_id(0) * output_tile + tl.arange(0, output_tile)
    is_output = outputs < num_outputs
    starts = codes + outputs.to(tl.int64)[:, None] * width
    sums = tl.zeros((output_tile, width_tile), dtype=tl.float32)
    for start in range(0, width, width_tile):
        columns = start + tl.arange(0, width_tile)
        inside = columns < width
        w = tl.load(starts + columns[None, :], mask=is_output[:, None] & inside[None, :], other=0)
        row = tl.load(x + columns, mask=inside, other=0.0)
        sums += w.to(tl.float32) * row.to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1) * (tl.load(absmax + outputs, mask=is_output, other=0.0) * step)
    tl.store(out + outputs, total.to(out.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["num_rows"])  # or numbers of rows would be compiled apart
def _int8_few_rows(
    x, codes, absmax, out, num_rows, num_outputs, step,
    width: tl.constexpr, row_tile: tl.constexpr, output_tile: tl.constexpr, width_tile: tl.constexpr,
):  # fmt: skip
    """All rows [N, I] times `output_tile` rows of the weight.

    int8 is exact in every dtype of x; the scales come last.
    """
    rows = tl.arange(0, row_tile)
    outputs = tl.program_id(0) * output_tile + tl.arange(0, output_tile)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    starts = codes + outputs.to(tl.int64)[:, None] * width
    sums = tl.zeros((output_tile, row_tile), dtype=tl.float32)  # the weight stays in registers on the left
    for start in range(0, width, width_tile):
        columns = start + tl.arange(0, width_tile)
        inside = columns < width
        w = tl.load(starts + columns[None, :], mask=is_output[:, None] & inside[None, :], other=0)
        tile = tl.load(x + rows[:, None] * width + columns[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(w.to(tile.dtype), tl.trans(tile), sums, input_precision="ieee")
    sums *= (tl.load(absmax + outputs, mask=is_output, other=0.0) * step)[:, None]
    to = out + rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), mask=is_row[None, :] & is_output[:, None])


@triton.jit
def _nf4_one_row(
    x, packed, absmax, values, out, num_outputs,
    width: tl.constexpr, output_tile: tl.constexpr, block_tile: tl.constexpr,
):  # fmt: skip
    """One row [I] times `output_tile` rows of the weight, by tiles [outputs, blocks of 64, 32 bytes].

    The high nibbles are the even columns: even and odd columns of x are read apart.
    """
    outputs = tl.program_id(0) * output_tile + tl.arange(0, output_tile)
    is_output = outputs < num_outputs
    starts = packed + outputs.to(tl.int64)[:, None, None] * (width // 2)
    scales = absmax + outputs.to(tl.int64)[:, None, None] * (width // 64)
    byte = tl.arange(0, 32)[None, None, :]
    sums = tl.zeros((output_tile, block_tile, 32), dtype=tl.float32)
    for start in range(0, width // 64, block_tile):
        block = start + tl.arange(0, block_tile)[None, :, None]
        inside = block < width // 64
        mask = is_output[:, None, None] & inside
        both = tl.load(starts + block * 32 + byte, mask=mask, other=0).to(tl.int32)
        even = tl.load(x + block * 64 + byte * 2, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(x + block * 64 + byte * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        products = tl.load(values + (both >> 4)) * even + tl.load(values + (both & 15)) * odd
        sums += products * tl.load(scales + block, mask=mask, other=0.0)
    total = tl.sum(tl.sum(sums, axis=2), axis=1)
    tl.store(out + outputs, total.to(out.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["num_rows"])
def _nf4_few_rows(
    x, packed, absmax, values, out, num_rows, num_outputs,
    width: tl.constexpr, row_tile: tl.constexpr, output_tile: tl.constexpr, block_tile: tl.constexpr,
):  # fmt: skip
    """All rows [N, I] times `output_tile` rows of the weight, by tiles [outputs, blocks of 64, 32 bytes].

    The weights are the very numbers that `_dequantize_nf4` gives. Run it with num_stages=1: Triton's pipeline would
    send each look-up in `values` through shared memory; the next tile's bytes are asked for by hand, one turn ahead.
    """
    rows = tl.arange(0, row_tile)
    outputs = tl.program_id(0) * output_tile + tl.arange(0, output_tile)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    blocks = tl.arange(0, block_tile)[None, :, None]
    starts = packed + outputs.to(tl.int64)[:, None, None] * (width // 2) + tl.arange(0, 32)[None, None, :]
    scales = absmax + outputs.to(tl.int64)[:, None, None] * (width // 64)
    columns = tl.arange(0, block_tile * 64)
    sums = tl.zeros((output_tile, row_tile), dtype=tl.float32)  # the weight stays in registers on the left
    ahead = tl.load(starts + blocks * 32, mask=is_output[:, None, None] & (blocks < width // 64), other=0)
    for start in range(0, width // 64, block_tile):
        both = ahead.to(tl.int32)
        block = start + blocks
        scale = tl.load(scales + block, mask=is_output[:, None, None] & (block < width // 64), other=0.0)
        column = start * 64 + columns
        mask = is_row[:, None] & (column < width)[None, :]
        tile = tl.load(x + rows[:, None] * width + column[None, :], mask=mask, other=0.0)
        block += block_tile
        ahead = tl.load(starts + block * 32, mask=is_output[:, None, None] & (block < width // 64), other=0)
        w = tl.interleave(tl.load(values + (both >> 4)), tl.load(values + (both & 15))) * scale
        w = tl.reshape(w.to(tile.dtype), (output_tile, block_tile * 64))
        sums = tl.dot(w, tl.trans(tile), sums, input_precision="ieee")
    to = out + rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), mask=is_row[None, :] & is_output[:, None])


@triton.jit
def _dequantize_int8(codes, absmax, out, width, step, width_tile: tl.constexpr):
    """`width_tile` columns of one row; the two products are rounded one after the other, as in Int8Weight."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * width_tile + tl.arange(0, width_tile)
    inside = columns < width
    w = tl.load(codes + row * width + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + columns, (w * tl.load(absmax + row) * step).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_nf4(packed, absmax, values, out, num_elements, element_tile: tl.constexpr):
    """`element_tile` elements of the flattened weight; each reads its byte, to write results side by side."""
    elements = tl.program_id(0).to(tl.int64) * element_tile + tl.arange(0, element_tile)
    inside = elements < num_elements
    both = tl.load(packed + elements // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(elements % 2 == 0, both >> 4, both & 15)
    w = tl.load(values + code) * tl.load(absmax + elements // 64, mask=inside, other=0.0)
    tl.store(out + elements, w.to(out.dtype.element_ty), mask=inside)

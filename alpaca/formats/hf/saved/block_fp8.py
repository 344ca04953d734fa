"""Weights in 8-bit floats with a scale for each block of rows and columns, as DeepSeek-V3 and transformers save them.

AutoFP8's, with one `weight_scale` for a whole matrix, are read as one block.

Each weight is its value times its block's `weight_scale_inv`, in float32, then rounded once to the dtype that is wanted
(transformers' `Fp8Dequantize`; https://huggingface.co/deepseek-ai/DeepSeek-V3, inference/kernel.py).
"""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from alpaca.errors import InputError
from alpaca.formats.hf.saved.packed import PackedWeight, Read, Specs, blocks, expect

_SCALE, _TENSOR_SCALE = "_scale_inv", "_scale"  # AutoFP8's is the second
_USUAL_BLOCK = (128, 128)
_EXPONENT_BIAS = 127
_ACTIVATION_PARTS = ("activation_scale", "input_scale", "output_scale")  # of what runs in 8 bit, which is not done here
_warn_once = functools.cache(logging.getLogger(__name__).warning)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def find(specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> list[PackedWeight]:
    """Every tensor with a `_scale_inv` beside it. Raises InputError for shapes that do not fit."""
    block = config.get("weight_block_size") or _USUAL_BLOCK
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise InputError(f"{where}: expected two whole numbers for 'weight_block_size', found {block!r}")
    by_block = [name for name in specs if name.endswith(f"weight{_SCALE}")]
    if by_block and not config.get("weight_block_size"):
        _warn_once(
            f"{where}: config.json names no weight_block_size; blocks of 128 x 128 are assumed, or where the number of "
            "scales is another, blocks of the size that it comes to"
        )
    by_tensor = [name for name in specs if name.endswith(f"weight{_TENSOR_SCALE}")]
    for name in by_tensor:
        is_one = math.prod(specs[name].shape) == 1
        expect(is_one, name, list(specs[name].shape), "one scale for the whole weight (AutoFP8's)", where=where)
    return [_weight(scales, (block[0], block[1]), specs, read, where) for scales in (*by_block, *by_tensor)]


def _weight(scales: str, block: tuple[int, int], specs: Specs, read: Read, where: str) -> PackedWeight:
    name = scales.removesuffix(_SCALE).removesuffix(_TENSOR_SCALE)
    expect(name in specs, name, "missing", "the weight of its scales", where=where)
    spec = specs[name]
    expect(
        spec.dtype in _FLOAT8 and len(spec.shape) == 2,
        name,
        f"{spec.dtype} {list(spec.shape)}",
        "an 8-bit float matrix",
        where=where,
    )
    grid = specs[scales].shape if len(specs[scales].shape) == 2 else (1, 1)
    sizes = [_block_size(length, count, usual) for length, count, usual in zip(spec.shape, grid, block, strict=True)]
    fits = all(-(-length // size) == count for length, size, count in zip(spec.shape, sizes, grid, strict=True))
    expect(fits, scales, list(specs[scales].shape), f"a scale for each {block} of {list(spec.shape)}", where=where)

    def unpack(dtype: torch.dtype) -> torch.Tensor:
        stored, scale = read(name), _as_float32(read(scales)).reshape(grid)
        by_column = scale.repeat_interleave(sizes[1], dim=1)[:, : spec.shape[1]]
        whole = torch.empty(spec.shape, dtype=dtype)
        for start, stop in blocks(spec.shape[0], spec.shape[1]):
            rows = torch.arange(start, stop) // sizes[0]
            whole[start:stop] = stored[start:stop].float() * by_column[rows]
        return whole

    unneeded = (f"{name.removesuffix('weight')}{part}" for part in _ACTIVATION_PARTS)
    parts = tuple(part for part in (name, scales, *unneeded) if part in specs)
    return PackedWeight(name=name, shape=spec.shape, dtype=None, parts=parts, unpack=unpack)


def _block_size(length: int, count: int, usual: int) -> int:
    """Rows or columns that share a scale: the declared number, else what the number of scales comes to."""
    return usual if -(-length // usual) == count else -(-length // count)


def _as_float32(scale: torch.Tensor) -> torch.Tensor:
    """Scales, which some save as bytes of exponents alone."""
    return (scale.float() - _EXPONENT_BIAS).exp2() if scale.dtype == torch.uint8 else scale.float()

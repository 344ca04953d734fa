"""Weights of compressed-tensors (LLM Compressor's): packed integers, int8, and 8-bit floats.

Each weight is (value - zero) * scale in the scale's dtype, with scales for the whole matrix, each row, each group of
columns, or each block (https://github.com/neuralmagic/compressed-tensors, quantization/lifecycle).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from alpaca.errors import InputError
from alpaca.formats.hf.saved.packed import (
    PackedWeight,
    Read,
    Specs,
    blocks,
    expect,
    find_bits,
    pick_shape,
    unpack_integers,
)

_PACKED, _SCALE, _ZERO, _ORDER, _SHAPE = (
    f".weight_{part}" for part in ("packed", "scale", "zero_point", "g_idx", "shape")
)
_READ_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_ACTIVATION_PARTS = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".input_g_idx",
)  # fmt: skip
_UNREAD_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")
_BLOCK_TEXT = re.compile(r"\s*\d{1,9}\s*x\s*\d{1,9}\s*", re.IGNORECASE | re.ASCII)
Blocks = tuple[set[int], set[int]]  # declared heights of blocks, and widths
_STORED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def find(specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> list[PackedWeight]:
    """Every module with a scale of its weight. Raises InputError for formats that are not read here."""
    for layout in _layouts(config):
        if layout not in _READ_FORMATS:
            raise InputError(
                f"{where} is saved by compressed-tensors in the format {layout!r}; expected one of "
                f"{', '.join(_READ_FORMATS)}: take the model it was made from, or decompress it by compressed-tensors"
            )
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise InputError(f"{where} is saved sparse by compressed-tensors; take the model it was made from")
    if config.get("transform_config") not in (None, {}, {"config_groups": {}}):
        raise InputError(
            f"{where} was saved by compressed-tensors with a transform_config: its weights are rotated (by QuIP or "
            "SpinQuant, say), and what undoes it is computed between layers, which is not done here; take the model "
            "it was made from"
        )
    blocks_of = _declared_blocks(config, where)
    modules = [name.removesuffix(_SCALE) for name in specs if name.endswith(_SCALE)]
    return [_weight(module, specs, read, config, blocks_of, where) for module in modules]


def _layouts(config: Mapping[str, Any]) -> set[str]:
    """The formats of the whole and of each group of layers; the groups' own count where the whole is mixed."""
    groups = [group.get("format") for group in _groups(config)]
    own = str(config.get("format") or "")
    return {str(layout) for layout in groups if layout} | (
        {own} if own not in ("", "mixed-precision", "dense") else set()
    )


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _weight(
    module: str, specs: Specs, read: Read, config: Mapping[str, Any], declared: Blocks, where: str
) -> PackedWeight:
    is_packed = f"{module}{_PACKED}" in specs
    integers = _read_packed if is_packed else _read_plain
    shape, values, zeros = integers(module, specs, read, config, where)
    scales, order = f"{module}{_SCALE}", f"{module}{_ORDER}"

    def unpack(dtype: torch.dtype) -> torch.Tensor:
        scale = read(scales)
        find_columns = _columns(scale, shape, read(order) if order in specs else None, declared, scales, where)
        zero, value_rows, whole = zeros(), values(), torch.empty(shape, dtype=dtype)
        for start, stop in blocks(*shape):
            rows = value_rows(start, stop).to(scale.dtype)
            if zero is not None:
                rows = rows - find_columns(zero, start, stop).to(scale.dtype)
            whole[start:stop] = rows * find_columns(scale, start, stop)
        return whole

    endings = (_PACKED, ".weight", _SCALE, _ZERO, _ORDER, _SHAPE, *_ACTIVATION_PARTS)
    parts = tuple(f"{module}{ending}" for ending in endings if f"{module}{ending}" in specs)
    return PackedWeight(name=f"{module}.weight", shape=shape, dtype=specs[scales].dtype, parts=parts, unpack=unpack)


def cache_scales(specs: Specs) -> list[str]:
    """Scales for keys and values in 8 bit, which no weight needs."""
    return [name for name in specs if name.endswith(_UNREAD_CACHE_SCALES)]


Rows = Callable[[int, int], torch.Tensor]
Found = tuple[tuple[int, int], Callable[[], Rows], Callable[[], torch.Tensor | None]]


def _read_packed(module: str, specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> Found:
    """Signed integers of 1 to 8 bits, stored from 0 on; zeros are packed along the rows."""
    packed, zero, size = (f"{module}{part}" for part in (_PACKED, _ZERO, _SHAPE))
    expect(specs[packed].dtype == torch.int32, packed, specs[packed].dtype, "int32 words", where=where)
    pick_shape(specs, size, where=where)
    num_rows, width = (int(number) for number in read(size).tolist())
    declared = {int(bits) for group in _groups(config) if (bits := (group.get("weights") or {}).get("num_bits"))}
    num_bits = find_bits(specs[packed].shape[1], width, declared=declared, name=packed, where=where)
    expect(specs[packed].shape[0] == num_rows, packed, list(specs[packed].shape), f"{num_rows} rows", where=where)
    offset = 1 << (num_bits - 1)

    def values() -> Rows:
        words = read(packed)
        return lambda start, stop: unpack_integers(words[start:stop], num_bits, width) - offset

    def zeros() -> torch.Tensor | None:
        if zero not in specs:
            return None
        stored = read(zero)
        if stored.dtype != torch.int32 or stored.shape[0] == num_rows:
            return stored
        return unpack_integers(stored.t(), num_bits, num_rows).t() - offset

    return (num_rows, width), values, zeros


def _read_plain(module: str, specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> Found:
    """A weight that is stored as int8 or in 8-bit floats."""
    name, zero = f"{module}.weight", f"{module}{_ZERO}"
    shape = pick_shape(specs, name, where=where)
    expect(
        specs[name].dtype in _STORED and len(shape) == 2, name, specs[name].dtype, "int8 or 8-bit floats", where=where
    )

    def values() -> Rows:
        stored = read(name)
        return lambda start, stop: stored[start:stop]

    return (shape[0], shape[1]), values, lambda: read(zero) if zero in specs else None


def _columns(
    scale: torch.Tensor,
    shape: tuple[int, int],
    order: torch.Tensor | None,
    declared: Blocks,
    name: str,
    where: str,
) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    """A function that spreads scales, or zeros of the same shape, over a range of rows: [rows, I] or [rows or 1, 1]."""
    num_rows, width = shape
    if scale.numel() == 1:
        return lambda part, start, stop: part.reshape(1, 1)
    expect(scale.dim() in (1, 2), name, list(scale.shape), "scales by rows, groups or blocks", where=where)
    by_rows, by_columns = (scale.shape[0], scale.shape[1] if scale.dim() == 2 else 1)
    height = 1 if by_rows == num_rows else _one_of(declared[0], -(-num_rows // by_rows))
    size = _one_of(declared[1], -(-width // by_columns))
    if by_columns == 1:
        size = width
    fits = -(-num_rows // height) == by_rows and -(-width // size) == by_columns
    expect(fits, name, list(scale.shape), f"scales that fit {list(shape)}", where=where)
    is_ordered = order is not None and order.numel() == width and bool((order >= 0).all())
    group = order.long() if is_ordered else torch.arange(width) // size

    def spread(part: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        part = part.reshape(by_rows, by_columns)
        rows = part[start:stop] if height == 1 else part[torch.arange(start, stop) // height]
        return rows if by_columns == 1 else rows[:, group]

    return spread


def _declared_blocks(config: Mapping[str, Any], where: str) -> Blocks:
    """The heights and widths of blocks that the groups of layers declare. Raises InputError for what is no block."""
    weights = [group.get("weights") or {} for group in _groups(config)]
    sizes = [
        _read_block(found["block_structure"], where) for found in weights if found.get("block_structure") is not None
    ]
    groups = {size for found in weights if isinstance(size := found.get("group_size"), int) and size > 0}
    return {height for height, _ in sizes}, {width for _, width in sizes} | groups


def _read_block(block: object, where: str) -> tuple[int, int]:
    """Rows and columns of a block: [128, 128], or "128x128" as older programs write it."""
    sizes = (
        [int(size) for size in block.lower().split("x")]
        if isinstance(block, str) and _BLOCK_TEXT.fullmatch(block)
        else block
    )
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(map(_is_size, sizes))):
        raise InputError(
            f"{where}: expected two whole numbers for 'block_structure', such as [128, 128] or \"128x128\", found "
            f"{block!r}; correct it in config.json's quantization_config"
        )
    return sizes[0], sizes[1]


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _one_of(declared: set[int], fallback: int) -> int:
    """The size that all groups of layers declare, else what the number of scales comes to."""
    return next(iter(declared)) if len(declared) == 1 else fallback

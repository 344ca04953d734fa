"""Weights of GPTQ (qweight, qzeros, scales, g_idx), with columns in any order ("desc_act") and 2, 3, 4 or 8 bits.

Each weight is scales[group] * (code - zero[group]), computed in the scales' dtype, as AutoGPTQ and GPTQModel do. In the
first format zeros are stored less one (https://github.com/ModelCloud/GPTQModel).
"""

from collections.abc import Mapping
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

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_WORD_BITS = 32


def find(specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> list[PackedWeight]:
    """Every module with a qweight. Raises InputError for formats of another layout."""
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in _ZERO_OFFSETS:
        raise InputError(
            f"{where} is a GPTQ model in the layout {layout!r}; expected gptq or gptq_v2: save it as one of these, by "
            "GPTQModel, or take the model it was made from"
        )
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    return [_weight(module, specs, read, config, _ZERO_OFFSETS[layout], where) for module in modules]


def _weight(
    module: str, specs: Specs, read: Read, config: Mapping[str, Any], zero_offset: int, where: str
) -> PackedWeight:
    words, zeros, scales, order = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    num_groups, num_rows = pick_shape(specs, scales, where=where)
    num_words = pick_shape(specs, words, where=where)[0]
    declared = {config["bits"]} if isinstance(config.get("bits"), int) else set()
    width = specs[order].shape[0] if order in specs else num_words * _WORD_BITS // (max(declared, default=4) or 4)
    num_bits = find_bits(num_words, width, declared=declared, name=words, where=where)
    expect(specs[words].shape[1] == num_rows, words, list(specs[words].shape), f"{num_rows} columns", where=where)
    expected = [num_groups, -(-num_rows * num_bits // _WORD_BITS)]
    expect(
        list(pick_shape(specs, zeros, where=where)) == expected,
        zeros,
        list(specs[zeros].shape),
        str(expected),
        where=where,
    )

    def unpack(dtype: torch.dtype) -> torch.Tensor:
        scale, codes = read(scales), read(words).t()
        zero = unpack_integers(read(zeros), num_bits, num_rows) + zero_offset
        group = read(order).long() if order in specs else _groups_in_order(width, num_groups, config)
        expect(
            bool(((group >= 0) & (group < num_groups)).all()),
            order,
            "beyond",
            f"groups below {num_groups}",
            where=where,
        )
        whole = torch.empty(num_rows, width, dtype=dtype)
        for start, stop in blocks(num_rows, width):
            centred = unpack_integers(codes[start:stop], num_bits, width) - zero.t()[start:stop][:, group]
            whole[start:stop] = scale.t()[start:stop][:, group] * centred
        return whole

    parts = tuple(part for part in (words, zeros, scales, order) if part in specs)
    return PackedWeight(
        name=f"{module}.weight", shape=(num_rows, width), dtype=specs[scales].dtype, parts=parts, unpack=unpack
    )


def _groups_in_order(width: int, num_groups: int, config: Mapping[str, Any]) -> torch.Tensor:
    size = config.get("group_size")
    step = size if isinstance(size, int) and size > 0 else -(-width // num_groups)
    return torch.arange(width) // step

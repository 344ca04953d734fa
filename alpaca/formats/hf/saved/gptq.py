"""Weights of GPTQ (qweight, qzeros, scales, g_idx), with columns in any order ("desc_act") and 2, 3, 4 or 8 bits.

Each weight is scales[group] * (code - zero[group]), computed in the scales' dtype, as AutoGPTQ and GPTQModel do. In the
first format zeros are stored less one, which GPTQModel takes from and adds to whole words of packed zeros: a zero
point of 0 borrows from its neighbours, and adding gives them back (https://github.com/ModelCloud/GPTQModel).
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

_LESS_ONE = {"gptq": True, "gptq_v2": False}  # whether zeros are stored less one
_WORD_BITS = 32
# What GPTQModel adds to the words of a row in turn. Of 3 bits it is not 1 to each value, but it is what it took away.
_WORD_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
_GPTQMODEL_ONES = {**_WORD_ONES, 3: (0x24924924, 0x92492492, 0x49249249)}


def find(specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> list[PackedWeight]:
    """Every module with a qweight. Raises InputError for formats of another layout."""
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in _LESS_ONE:
        raise InputError(
            f"{where} is a GPTQ model in the layout {layout!r}; expected gptq or gptq_v2: save it as one of these, by "
            "GPTQModel, or take the model it was made from"
        )
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    return [_weight(module, specs, read, config, _LESS_ONE[layout], where) for module in modules]


def _weight(
    module: str, specs: Specs, read: Read, config: Mapping[str, Any], less_one: bool, where: str
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
        zero = _read_zeros(read(zeros), num_bits, num_rows, config, less_one=less_one)
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


def _read_zeros(
    words: torch.Tensor, num_bits: int, count: int, config: Mapping[str, Any], *, less_one: bool
) -> torch.Tensor:
    """Packed words [G, W] -> zero points [G, O].

    Of 3 bits AutoGPTQ stored each value less one, and GPTQModel other words: config.json says which of them wrote it.
    """
    ones = (_GPTQMODEL_ONES if _is_from_gptqmodel(config) else _WORD_ONES).get(num_bits)
    if not less_one:
        return unpack_integers(words, num_bits, count)
    if ones is None:
        return unpack_integers(words, num_bits, count) + 1
    added = words.long() + torch.tensor(ones)[torch.arange(words.shape[1]) % len(ones)]
    wrapped = (added + 2**31) % 2**32 - 2**31
    return unpack_integers(wrapped.int(), num_bits, count)


def _is_from_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether `meta` names GPTQModel as the quantizer: a text such as "gptqmodel:1.7.0", or a list of such."""
    meta = config.get("meta")
    return isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer")).lower()


def _groups_in_order(width: int, num_groups: int, config: Mapping[str, Any]) -> torch.Tensor:
    size = config.get("group_size")
    step = size if isinstance(size, int) and size > 0 else -(-width // num_groups)
    return torch.arange(width) // step

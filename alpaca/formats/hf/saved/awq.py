"""Weights of AWQ (qweight, qzeros, scales) in its usual layout, "gemm": 4 bit, outputs interleaved within each word.

Each weight is scales[group] * (code - zero[group]), computed in the scales' dtype, as AutoAWQ does
(https://github.com/casper-hansen/AutoAWQ).
"""

from collections.abc import Mapping
from typing import Any

import torch

from alpaca.errors import InputError
from alpaca.formats.hf.saved.packed import PackedWeight, Read, Specs, blocks, expect, pick_shape, unpack_integers

_NUM_BITS, _PER_WORD = 4, 8
_PLACE_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output within its word


def find(specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> list[PackedWeight]:
    """Every module with a qweight. Raises InputError for other layouts and numbers of bits."""
    version, bits = str(config.get("version") or "gemm").lower(), config.get("bits", config.get("w_bit", _NUM_BITS))
    if version != "gemm" or bits != _NUM_BITS:
        raise InputError(
            f"{where} is an AWQ model of version {version!r} with {bits} bits; expected gemm with {_NUM_BITS}: save it "
            "so, by AutoAWQ, or take the model it was made from"
        )
    modules = [name.removesuffix(".qweight") for name in specs if name.endswith(".qweight")]
    return [_weight(module, specs, read, where) for module in modules]


def _weight(module: str, specs: Specs, read: Read, where: str) -> PackedWeight:
    words, zeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    num_groups, num_rows = pick_shape(specs, scales, where=where)
    width, num_words = pick_shape(specs, words, where=where)
    expect(num_words * _PER_WORD == num_rows, words, list(specs[words].shape), f"{num_rows} outputs", where=where)
    expect(width % num_groups == 0, scales, f"{num_groups} groups", f"a divisor of {width}", where=where)
    expected = (num_groups, num_words)
    has_zeros = zeros in specs
    expect(not has_zeros or specs[zeros].shape == expected, zeros, specs.get(zeros), str(expected), where=where)

    def unpack(dtype: torch.dtype) -> torch.Tensor:
        scale, size = read(scales), width // num_groups
        zero = _unpack(read(zeros), num_rows) if has_zeros else torch.zeros(num_groups, num_rows, dtype=torch.int32)
        stored, whole = read(words), torch.empty(num_rows, width, dtype=dtype)
        for start, stop in blocks(width, num_rows, size):
            groups = slice(start // size, stop // size)
            centred = _unpack(stored[start:stop], num_rows) - zero[groups].repeat_interleave(size, dim=0)
            whole[:, start:stop] = (centred * scale[groups].repeat_interleave(size, dim=0)).t()
        return whole

    parts = tuple(part for part in (words, zeros, scales) if part in specs)
    return PackedWeight(
        name=f"{module}.weight", shape=(num_rows, width), dtype=specs[scales].dtype, parts=parts, unpack=unpack
    )


def _unpack(words: torch.Tensor, count: int) -> torch.Tensor:
    """int32 words [R, O / 8] -> codes [R, O] in the outputs' order."""
    codes = unpack_integers(words, _NUM_BITS, count).view(len(words), -1, _PER_WORD)
    return codes[..., _PLACE_OF].reshape(len(words), count)

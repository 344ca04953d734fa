"""Weights that bitsandbytes quantized before they were saved: int8 by rows, and 4 bit by blocks.

Names and layouts: `Int8Params` (weight, SCB) and `QuantState.as_dict` of https://github.com/bitsandbytes-foundation.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from alpaca.errors import InputError
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.formats.hf.quantization import NF4_VALUES, Int8Weight, Nf4Weight
from alpaca.formats.hf.saved.packed import PackedWeight, Read, Specs, expect, pick_shape

_ROW_FORMAT = 0
_STATE = ".quant_state.bitsandbytes__"
_OWN_BLOCK = 64
_SCALE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def find(specs: Specs, read: Read, config: Mapping[str, Any], where: str) -> list[PackedWeight]:
    """Every weight with the scales of int8 beside it (SCB), or with a state of 4 bit. Raises InputError."""
    int8 = [_int8(name.removesuffix(".SCB"), specs, read, where) for name in specs if name.endswith(".SCB")]
    return int8 + [_four_bit(name, specs, read, where) for name in specs if _STATE in name]


def saved_kind(config: Mapping[str, Any]) -> str:
    """What a quantization_config of bitsandbytes says its weights are: "int8", "nf4" or "fp4"."""
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return "int8"
    return str(config.get("bnb_4bit_quant_type", "fp4"))


def _int8(module: str, specs: Specs, read: Read, where: str) -> PackedWeight:
    name, scales, layout = (f"{module}.{part}" for part in ("weight", "SCB", "weight_format"))
    shape = pick_shape(specs, name, where=where)
    expect(specs[scales].shape == shape[:1], scales, list(specs[scales].shape), f"[{shape[0]}]", where=where)
    expect(specs[name].dtype == torch.int8, name, specs[name].dtype, "int8", where=where)

    def keep() -> Int8Weight:
        if layout in specs and int(read(layout)) != _ROW_FORMAT:
            raise InputError(
                f"{where}: {layout} is {int(read(layout))}, a layout of old GPUs; expected 0, rows: save the model "
                "again with a bitsandbytes of 0.45 or later"
            )
        return Int8Weight(read(name), read(scales).float())

    parts = tuple(part for part in (name, scales, layout) if part in specs)
    return PackedWeight(
        name=name, shape=shape, dtype=None, parts=parts, unpack=lambda dtype: keep().dequantize(dtype), keep=keep
    )


def _four_bit(state_name: str, specs: Specs, read: Read, where: str) -> PackedWeight:
    name = state_name.partition(_STATE)[0]
    state = _read_state(read(state_name), state_name, where)
    shape, block = tuple(state["shape"]), state["blocksize"]
    num_bytes = specs[name].num_bytes if name in specs else pick_shape(specs, name, where=where)[0]
    expected = -(-shape[0] * shape[1] // 2)
    expect(num_bytes == expected, name, f"{num_bytes} bytes", f"{expected} for {list(shape)}", where=where)

    def scales() -> torch.Tensor:
        return _read_scales(name, state, specs, read, where)

    def keep() -> Nf4Weight:
        absmax = scales().repeat_interleave(block // _OWN_BLOCK)[: -(-shape[0] * shape[1] // _OWN_BLOCK)]
        return Nf4Weight(read(name).reshape(-1).view(torch.uint8), absmax, shape)

    def unpack(dtype: torch.dtype) -> torch.Tensor:
        codes = read(name).reshape(-1).view(torch.uint8)
        values = read(f"{name}.quant_map").float()[torch.stack([codes >> 4, codes & 15], dim=1).view(-1).int()]
        by_value = scales().repeat_interleave(block)[: shape[0] * shape[1]]
        return (values[: shape[0] * shape[1]] * by_value).view(shape).to(dtype)

    is_own = block % _OWN_BLOCK == 0 and torch.equal(read(f"{name}.quant_map").float(), torch.tensor(NF4_VALUES))
    parts = tuple(part for part in (name, *(f"{name}.{part}" for part in _SCALE_PARTS), state_name) if part in specs)
    return PackedWeight(
        name=name, shape=shape, dtype=FLOAT_DTYPES.get(str(state.get("dtype"))), parts=parts,
        unpack=(lambda dtype: keep().dequantize(dtype)) if is_own else unpack, keep=keep if is_own else None,
    )  # fmt: skip


def _read_state(content: torch.Tensor, name: str, where: str) -> dict[str, Any]:
    """The JSON in a tensor of bytes: shape, blocksize, dtype and the scales' own settings."""
    try:
        state = json.loads(bytes(content.tolist()))
        shape, block = state["shape"], state["blocksize"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: {name} is no state of bitsandbytes ({error}); copy it again") from error
    numbers = [*shape, block] if isinstance(shape, list) and len(shape) == 2 else []
    if not numbers or not all(isinstance(number, int) and 0 < number < 1 << 28 for number in numbers):
        raise InputError(f"{where}: {name} says shape {shape!r} in blocks of {block!r}; copy it again")
    return state


def _read_scales(name: str, state: Mapping[str, Any], specs: Specs, read: Read, where: str) -> torch.Tensor:
    """The blocks' scales, float32 [ceil(E / blocksize)], with their own quantization undone."""
    absmax = read(f"{name}.absmax")
    expected = -(-state["shape"][0] * state["shape"][1] // state["blocksize"])
    expect(absmax.numel() == expected, f"{name}.absmax", absmax.numel(), f"{expected} scales", where=where)
    if "nested_blocksize" not in state:
        return absmax.reshape(-1).float()
    values, outer = read(f"{name}.nested_quant_map").float(), read(f"{name}.nested_absmax").float()
    by_value = outer.repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
    return values[absmax.reshape(-1).int()] * by_value + torch.tensor(state["nested_offset"], dtype=torch.float32)

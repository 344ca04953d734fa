"""A tensor's bytes in a GGUF file, some rows at a time. No tensor is held whole unless an adapter is merged into it."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from alpaca.architecture.tensors import Shape
from alpaca.errors import MissingPackage, NumbersOverflow
from alpaca.formats.meta.sharding import rotary_pairs

_TORCH_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_QUANTIZED_MAX = 127 * torch.finfo(torch.float16).max  # a block's scale is its largest value / 127, as float16
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One tensor of the GGUF file: its name, shape, type ("f32", "q8_0", …), and where it is read from.

    num_rotary_heads: heads whose rows are reordered; None for all but the query and key projections.
    """

    name: str
    shape: Shape
    kind: str
    read: Callable[[], torch.Tensor]
    num_rotary_heads: int | None = None

    @property
    def num_bytes(self) -> int:
        elements = math.prod(self.shape)
        return elements // 32 * 34 if self.kind == "q8_0" else elements * _TORCH_TYPES[self.kind].itemsize


def import_gguf():
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingPackage(f"GGUF files need the package gguf ({error}): pip install gguf==0.19.0") from error


def encoded_blocks(placed: Placed) -> Iterator[memoryview]:
    """A tensor's bytes in the file, some rows at a time. Raises NumbersOverflow for values its type cannot hold."""
    for rows in _row_blocks(placed.read(), placed.num_rotary_heads):
        encoded = _quantized(rows, placed) if placed.kind == "q8_0" else _cast(rows, placed)
        yield memoryview(encoded.reshape(-1).view("uint8"))


def _row_blocks(tensor: torch.Tensor, num_rotary_heads: int | None) -> Iterator[torch.Tensor]:
    step = max(1, _BLOCK_BYTES // (4 * math.prod(tensor.shape[1:])))
    if num_rotary_heads is None:
        yield from tensor.split(step)
        return
    pairs = rotary_pairs(tensor, num_rotary_heads)
    for heads in pairs.split(max(1, step * num_rotary_heads // len(tensor))):
        yield heads.reshape(-1, *tensor.shape[1:])


def _cast(rows: torch.Tensor, placed: Placed):
    """Rows as numpy's; bfloat16, which numpy lacks, as its bits."""
    cast = rows.to(_TORCH_TYPES[placed.kind]).contiguous()
    low, high = torch.aminmax(cast)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        _refuse(rows, placed)
    return cast.view(torch.int16).numpy() if placed.kind == "bf16" else cast.numpy()


def _quantized(rows: torch.Tensor, placed: Placed):
    rows = rows.float()
    low, high = torch.aminmax(rows)
    if not (low >= -_QUANTIZED_MAX and high <= _QUANTIZED_MAX):
        _refuse(rows, placed)
    gguf = import_gguf()
    return gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)


def _refuse(rows: torch.Tensor, placed: Placed) -> None:
    rows = rows.float()
    if not torch.isfinite(rows).all():
        raise NumbersOverflow(f"{placed.name} holds infinity or NaN: the model is damaged")
    raise NumbersOverflow(
        f"{placed.name} holds {rows.abs().max():g}, more than {placed.kind} can; pass --outtype bf16 or f32"
    )

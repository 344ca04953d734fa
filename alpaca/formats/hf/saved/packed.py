"""What all formats of saved quantized weights share: one weight made of several stored tensors, and packed integers.

Legend: O output rows, I input width, G groups of columns that share a scale.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from alpaca.errors import InputError
from alpaca.formats.hf.folder import TensorSpec
from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight

Specs = Mapping[str, TensorSpec]
Read = Callable[[str], torch.Tensor]
_WORD_BITS = 32
_CHUNK_ELEMENTS = 2**22  # integers and floats of a weight are unpacked for this many elements at a time


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One weight as it was saved.

    name: the whole weight's.    shape: of the whole weight, [O, I].
    dtype: the one in which the format's own library computes it; None where it is computed in float32 and then rounded
    to whatever is wanted.
    parts: the stored tensors that make it up, whose names the whole model does not have.
    unpack: computes the whole weight in a dtype.
    keep: reads it as int8 or nf4, where it is one of those that this project computes with; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    parts: tuple[str, ...]
    unpack: Callable[[torch.dtype], torch.Tensor]
    keep: Callable[[], Int8Weight | Nf4Weight] | None = None


Find = Callable[[Specs, Read, Mapping[str, Any], str], list[PackedWeight]]


def unpack_integers(words: torch.Tensor, num_bits: int, count: int) -> torch.Tensor:
    """int32 words [R, W] -> the first `count` unsigned integers of `num_bits` in each row: int32 [R, count].

    The words of a row are one stream of bits, the lowest of each word first, with integers across words where their
    bits do not divide 32.
    """
    starts = torch.arange(count) * num_bits
    low, shift = starts // _WORD_BITS, starts % _WORD_BITS
    if _WORD_BITS % num_bits == 0:
        return (words[:, low] >> shift.int()) & ((1 << num_bits) - 1)
    wide = words.long() & 0xFFFFFFFF
    following = torch.nn.functional.pad(wide, (0, 1))[:, low + 1]
    return (((wide[:, low] | following << _WORD_BITS) >> shift) & ((1 << num_bits) - 1)).int()


def find_bits(num_words: int, count: int, *, declared: set[int], name: str, where: str) -> int:
    """Bits of each of `count` integers that fill `num_words` words. Raises InputError where no declared size fits."""
    fitting = [bits for bits in range(1, 9) if -(-count * bits // _WORD_BITS) == num_words]
    likely = [bits for bits in fitting if bits in declared] or fitting
    if len(likely) != 1:
        raise InputError(
            f"{where}: {name} holds {num_words} words a row for {count} values, which is no whole number of bits each "
            f"(config.json says {sorted(declared) or 'none'}); the files are not of one model"
        )
    return likely[0]


def blocks(num_rows: int, width: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `_CHUNK_ELEMENTS` elements, each but the last a multiple of `step` rows."""
    rows = max(1, _CHUNK_ELEMENTS // max(1, width * step)) * step
    for start in range(0, num_rows, rows):
        yield start, min(start + rows, num_rows)


def pick_shape(specs: Specs, name: str, *, where: str) -> tuple[int, ...]:
    """A stored tensor's shape. Raises InputError where it is missing."""
    if name not in specs:
        raise InputError(f"{where} lacks {name!r}, without which its quantized weight cannot be read; copy it again")
    return specs[name].shape


def expect(is_right: bool, name: str, found: object, expected: str, *, where: str) -> None:
    """Raise InputError where a stored tensor does not fit the others."""
    if not is_right:
        raise InputError(f"{where}: {name} is {found}, expected {expected}; the files are damaged or of another model")

"""The residual of a float32 difference: those elements where raw + (tuned - raw) does not restore tuned bit for bit.

Two float32 numbers of different size do not survive subtraction and addition: after 1,000 training steps 7 % of the
elements come back a last bit off. `diff_residual.dat` holds for these how far their bits are from where they should be,
tensor after tensor, in records of one block of BLOCK_ELEMENTS elements (flat, in row-major order):

    block number, number of elements, bytes of gaps, bytes of steps (four little-endian uint32), gaps, steps

A gap is the distance to the previous listed element (from -1), a step the difference of the bit patterns as integers,
zigzag coded. Both are 32-bit integers split into byte planes and compressed by zlib: gaps and steps are small, so three
of four planes are zeros. zlib's checksum finds damage. What is not the same on every machine (NaN, the mean that makes
a [PAD] row) counts as restored to all bits zero, and so always has its bits listed.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from alpaca.errors import InputError

RESIDUAL_NAME = "diff_residual.dat"
BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32: stays in the processor's cache
_RECORD = struct.Struct("<4I")
_INT_OF = {4: torch.int32, 2: torch.int16}


def blocks(num_elements: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, stop) for each block."""
    for number, start in enumerate(range(0, num_elements, BLOCK_ELEMENTS)):
        yield number, start, min(start + BLOCK_ELEMENTS, num_elements)


def restored_bits(raw: torch.Tensor, diff: torch.Tensor, dtype: torch.dtype, num_reproducible: int) -> torch.Tensor:
    """The bits (int32) of raw + diff [n], both float32, rounded to `dtype`; zero from `num_reproducible` on."""
    total = (raw + diff).to(dtype)
    bits = total.view(_INT_OF[dtype.itemsize]).to(torch.int32, copy=dtype.itemsize != 4)
    bits.masked_fill_(total != total, 0)
    bits[max(0, num_reproducible) :] = 0
    return bits


def float_bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of floats [n] as int32."""
    return values.view(_INT_OF[values.dtype.itemsize]).to(torch.int32)


class ResidualWriter:
    """Writes one record for each block that needs one, one tensor after another."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = 0
        self.num_elements = 0

    def add(self, block: int, restored: torch.Tensor, wanted: torch.Tensor) -> None:
        """Record the elements of a block (int32 [n]) whose bits differ from the wanted ones."""
        positions = (restored != wanted).nonzero().view(-1)
        if not len(positions):
            return
        steps = wanted[positions] - restored[positions]  # wraps around, and back when it is added
        gaps = torch.diff(positions, prepend=torch.tensor([-1])).to(torch.int32)
        packed = _pack(gaps), _pack((steps << 1) ^ (steps >> 31))
        record = _RECORD.pack(block, len(positions), *map(len, packed)) + b"".join(packed)
        self._file.write(record)
        self.num_bytes += len(record)
        self.num_elements += len(positions)


class TensorResidual:
    """One tensor's records, read whole (compressed). Raises InputError when they are damaged."""

    def __init__(self, path: Path, offset: int, num_bytes: int) -> None:
        self._path = path
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(num_bytes)
        self._records: dict[int, tuple[int, bytes, bytes]] = {}
        try:
            self._parse(content, num_bytes)
        except (struct.error, ValueError) as error:
            raise self._damaged(str(error)) from error

    def apply(self, block: int, bits: torch.Tensor) -> None:
        """Turn a block's restored bits (int32 [n]) into the wanted ones, in place."""
        if block not in self._records:
            return
        count, gaps, steps = self._records[block]
        try:
            positions = _unpack(gaps, count).long().cumsum(0) - 1
            coded = _unpack(steps, count)
            if positions[0] < 0 or (positions.diff() <= 0).any() or positions[-1] >= len(bits):
                raise ValueError(f"block {block} points outside itself")
        except (zlib.error, ValueError) as error:
            raise self._damaged(str(error)) from error
        bits[positions] += ((coded >> 1) & 0x7FFFFFFF) ^ -(coded & 1)

    def _parse(self, content: bytes, num_bytes: int) -> None:
        if len(content) != num_bytes:
            raise ValueError("it ends too early")
        at = 0
        while at < num_bytes:
            block, count, gap_bytes, step_bytes = _RECORD.unpack_from(content, at)
            middle = at + _RECORD.size + gap_bytes
            if not 0 < count <= BLOCK_ELEMENTS or middle + step_bytes > num_bytes:
                raise ValueError(f"a record at {at} of {num_bytes} bytes is larger than its tensor")
            self._records[block] = (count, content[at + _RECORD.size : middle], content[middle : middle + step_bytes])
            at = middle + step_bytes

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self._path} is damaged, get it again: {reason}")


def _pack(values: torch.Tensor) -> bytes:
    planes = values.contiguous().view(torch.uint8).view(-1, 4).T.contiguous()
    return zlib.compress(planes.numpy(), 1)


def _unpack(packed: bytes, count: int) -> torch.Tensor:
    """Read `count` int32 values. Raises zlib.error or ValueError for damaged bytes."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(packed, 4 * count)
    content += unpacker.decompress(unpacker.unconsumed_tail, 1)  # nothing but the checksum, which is compared here
    if len(content) != 4 * count or not unpacker.eof:
        raise ValueError(f"expected {count} numbers in a record")
    planes = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(4, count)
    return planes.T.contiguous().view(-1).view(torch.int32)

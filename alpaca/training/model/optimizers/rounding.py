"""One parameter's update in bfloat16, its results rounded up or down by chance: the arithmetic, in plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 16  # elements of a parameter that are computed at a time; in float32 they fit a core's cache
# An integer hash of little bias: Chris Wellons, "Prospecting for hash functions" (lowbias32).
FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B
# Bit patterns of float32 without the sign: rounding a value from LAST_FINITE on up would make it infinite.
LAST_FINITE, INFINITY, QUIET = 0x7F7F0000, 0x7F800000, 0x00400000


@dataclass(frozen=True, kw_only=True)
class Update:
    """The numbers of one parameter's step; unsigned ones are stored as int32 of the same bits.

    decay: the factor of weight decay.    step_size: the learning rate divided by the first moment's bias correction.
    root_scale: the second moment's bias correction of its root.    first_element: the index of the first element here
    in the whole parameter.    keys: select the random bits.
    """

    decay: float
    first_share: float
    second_kept: float
    second_share: float
    step_size: float
    root_scale: float
    eps: float
    first_element: int
    keys: tuple[int, int]


def update_parameter(weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, update: Update) -> None:
    """One step of AdamW on rows of equal length, in place: weights and both moments in bfloat16 or float32."""
    for start in range(0, len(weights), CHUNK_ELEMENTS):
        part = slice(start, start + CHUNK_ELEMENTS)
        _update_chunk(weights[part], gradient[part], first[part], second[part], update, start)


def _update_chunk(weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, update: Update, start: int) -> None:
    """Update one chunk, products and sums one by one, as in the kernel: fused ones would round once."""
    g, m, v = gradient.float(), first.float(), second.float()
    m = m + (g - m) * update.first_share
    v = v * update.second_kept + g * g * update.second_share
    change = m / (v.sqrt() * update.root_scale + update.eps) * update.step_size
    w = weights.float() * update.decay - change
    if weights.dtype == torch.float32:
        draws = (None, None, None)
    else:
        draws = draw_bits(len(w), start + update.first_element, update.keys, device=weights.device)
    for target, value, own in zip((weights, first, second), (w, m, v), draws, strict=True):
        target.copy_(value if own is None else round_stochastically(value, own))


def round_stochastically(values: Tensor, draws: Tensor) -> Tensor:
    """Round float32 `values` to one of their two bfloat16 neighbours; `draws` (int32 from 0 to 65535) decide which.

    Values that bfloat16 can hold are kept. Finite values stay finite; infinities and NaNs stay as they are.
    """
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    rounded = bits + draws.masked_fill(magnitude >= LAST_FINITE, 0)
    rounded = torch.where(magnitude > INFINITY, bits | QUIET, rounded)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)


def draw_bits(
    num_elements: int, first: int, keys: tuple[int, int], *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers from 0 to 65535 (int32) for each element from index `first` on: for the weight and both moments."""
    index = torch.arange(num_elements, dtype=torch.int32, device=device) + as_signed(first)
    outer = _mix(index ^ keys[0])
    inner = _mix(outer ^ keys[1])
    return inner & 0xFFFF, (inner >> 16) & 0xFFFF, (outer >> 16) & 0xFFFF


def _mix(bits: Tensor) -> Tensor:
    """The hash on int32: products wrap around, and shifts fill with zeros."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * FIRST_FACTOR
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * as_signed(SECOND_FACTOR)
    return bits ^ ((bits >> 16) & 0xFFFF)


def as_signed(number: int) -> int:
    """The lowest 32 bits of `number` as a signed int32."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)

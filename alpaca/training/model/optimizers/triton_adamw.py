"""`rounding.update_parameter` as one Triton kernel for NVIDIA GPUs: the same bits, in one pass over the memory.

For a bfloat16 parameter it reads weight, gradient and two moments, and writes weight and moments: 14 bytes an element.
"""

import torch
import triton
import triton.language as tl

from alpaca.training.model.optimizers.rounding import FIRST_FACTOR, INFINITY, LAST_FINITE, QUIET, SECOND_FACTOR, Update

_BLOCK = 1024  # elements of one program; with 4 warps each thread has 8 of them, 16 bytes of bfloat16
_FIRST_FACTOR, _SECOND_FACTOR = tl.constexpr(FIRST_FACTOR), tl.constexpr(SECOND_FACTOR)
_LAST_FINITE, _INFINITY, _QUIET = tl.constexpr(LAST_FINITE), tl.constexpr(INFINITY), tl.constexpr(QUIET)


def update_parameter(
    weights: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor, update: Update
) -> None:
    """One step of AdamW on rows of equal length, in place: weights and both moments in bfloat16 or float32."""
    num_elements = len(weights)
    if not num_elements:  # an empty shard: the parameter has fewer rows than there are processes
        return
    _adamw_kernel[(triton.cdiv(num_elements, _BLOCK),)](
        weights, gradient, first, second, num_elements, update.first_element, *update.keys,
        update.decay, update.first_share, update.second_kept, update.second_share, update.step_size,
        update.root_scale, update.eps,
        block=_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_element", "first_key", "second_key"])
def _adamw_kernel(
    weights, gradient, first, second, num_elements, first_element, first_key, second_key,
    decay, first_share, second_kept, second_share, step_size, root_scale, eps,
    block: tl.constexpr,
):  # fmt: skip
    """One block of elements. Roots and quotients are those of IEEE 754, and products are not fused with sums."""
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < num_elements
    w = tl.load(weights + index, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(first + index, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + index, mask=inside, other=0.0).to(tl.float32)
    m = m + (g - m) * first_share
    v = v * second_kept + g * g * second_share
    change = tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps) * step_size
    w = w * decay - change
    if weights.dtype.element_ty == tl.float32:
        tl.store(weights + index, w, mask=inside)
        tl.store(first + index, m, mask=inside)
        tl.store(second + index, v, mask=inside)
    else:
        element = (index.to(tl.int32) + first_element).to(tl.uint32, bitcast=True)
        outer = _mix(element ^ first_key.to(tl.uint32, bitcast=True))
        inner = _mix(outer ^ second_key.to(tl.uint32, bitcast=True))
        tl.store(weights + index, _round(w, inner & 0xFFFF), mask=inside)
        tl.store(first + index, _round(m, inner >> 16), mask=inside)
        tl.store(second + index, _round(v, outer >> 16), mask=inside)


@triton.jit
def _mix(bits):
    """The hash of `rounding._mix`, on uint32."""
    bits = (bits ^ (bits >> 16)) * _FIRST_FACTOR
    bits = (bits ^ (bits >> 15)) * _SECOND_FACTOR
    return bits ^ (bits >> 16)


@triton.jit
def _round(values, draws):
    """`rounding.round_stochastically`: float32 to bfloat16 by uint32 draws from 0 to 65535."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = bits + tl.where(magnitude >= _LAST_FINITE, 0, draws)
    rounded = tl.where(magnitude > _INFINITY, bits | _QUIET, rounded)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)

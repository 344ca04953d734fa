"""Products of bfloat16 weights on a CPU that has no units for bfloat16: in float32, several times faster there.

A product of two bfloat16 numbers is exact in float32, in which such units add up, too. So the results are what they
would compute, but for the order of the sums: only the time differs.
"""

import logging
import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

logger = logging.getLogger(__name__)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has units for products of bfloat16."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widen_products(model: nn.Module) -> None:
    """Have the linear layers of a bfloat16 model multiply in float32. Names, weights and what they return stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear
    logger.info(
        "numerics fast: this CPU has no units for bfloat16 (AVX512-BF16 or AMX), so products are computed in float32; "
        "weights and moments stay bfloat16"
    )


class WideLinear(nn.Linear):
    """The layer whose product is computed in float32 and rounded to its weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply_wide(x, self.weight, self.bias)


def multiply_wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] by weight [O, I], and bias [O] -> [..., O] in x's dtype; differentiable once.

    What is kept for the backward pass is x and the weight as they are, not their float32 copies.
    """
    product = _WideProduct.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x.float() @ weight.float().t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.float()
        by_x = (gradient @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        by_weight = (gradient.t() @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return by_x, by_weight

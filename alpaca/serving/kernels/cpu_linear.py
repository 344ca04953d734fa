"""Whole and int8 weights laid out for a CPU's kernels: ours in C++, or oneDNN's; whichever is the faster one here.

Legend: N rows (packed tokens), I input width, O output width.
"""

import ctypes
import math
import time
from collections.abc import Callable
from functools import cache

import torch

from alpaca.serving.kernels.linear_base import Linear, PlainLinear, products_agree
from alpaca.serving.kernels.native.library import cpu_flags, load
from alpaca.serving.kernels.native.structures import KINDS, WeightFields, address

_TRIED_ROWS = (1, 8, 64)
_TRIED_ELEMENTS = 1 << 21  # of a weight, at most: enough to tell two kernels apart
_WORTH_A_TRIAL = 1 << 18  # elements; below, starting threads takes longer than the product
_CLEARLY_FASTER = 1.2  # below, the choice must not change from one start to the next


class NativeLinear(Linear):
    """A weight as it is stored (float32, float16, bfloat16, int8 with a scale per row), multiplied in float32.

    Inputs of another dtype are made float32, and the outputs rounded. What a row comes to does not depend on the other
    rows.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Packs weight [O, I]; scales [O] float32, for int8."""
        library = load()
        self.out_features, self.in_features = weight.shape
        self._scales = None if scales is None else scales.float().contiguous()
        num_rows = -(-self.out_features // library.panel_rows()) * library.panel_rows()
        self._packed = torch.empty(num_rows, self.in_features, dtype=weight.dtype)
        weight = weight.contiguous()
        library.pack_weight(KINDS[weight.dtype], weight.data_ptr(), self._packed.data_ptr(), *weight.shape)
        self.num_bytes = weight.nbytes + (0 if self._scales is None else self._scales.nbytes)
        self._fields = self.fields()
        self._multiply, self._address = library.multiply_packed, ctypes.addressof(self._fields)

    def fields(self, bias: torch.Tensor | None = None) -> WeightFields:
        """What the kernels are told of this weight, for as long as it and `bias` [O] are kept."""
        return WeightFields(
            kind=KINDS[self._packed.dtype], width=self.out_features, depth=self.in_features,
            packed=self._packed.data_ptr(), scales=address(self._scales), bias=address(bias),
        )  # fmt: skip

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, out = x.float().contiguous(), torch.empty(x.shape[0], self.out_features)
        self._multiply(self._address, rows.data_ptr(), out.data_ptr(), x.shape[0])
        return out.to(x.dtype)


class PackedLinear(Linear):
    """The weight laid out once the way oneDNN's CPU kernels read it: 2 to 7 times as fast as PlainLinear.

    The operators are private to torch (checked in 2.11 and 2.13), so `make_packed` verifies them on every weight. No
    batch size is given to the packing: that one layout was the fastest, or as fast, from 1 to 512 rows.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Packs weight [O, I]; raises whatever torch raises where it cannot."""
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes  # the packed tensor does not tell its size; at most a few rows of padding more
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def held_dtype(stored: set[torch.dtype], dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU holds weights that are computed in `dtype`, by those they are stored in.

    Half as many bytes are read where float32 would only widen them: that is the same weight.
    """
    if dtype == torch.float32 and len(stored) == 1 and stored < {torch.float16, torch.bfloat16} and load():
        return next(iter(stored))
    return dtype


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for products of bfloat16 or float16, by its own list of what it can do."""
    units = {torch.bfloat16: {"avx512_bf16", "amx_bf16"}, torch.float16: {"avx512_fp16", "amx_fp16"}}.get(dtype, set())
    return bool(units & cpu_flags())


def make_packed(weight: torch.Tensor, dtype: torch.dtype) -> Linear | None:
    """Pack a weight [O, I] for inputs of `dtype`; None where neither way to do it gives the plain layer's product."""
    if weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    shape = (min(weight.shape[0], max(64, _TRIED_ELEMENTS // weight.shape[1])), weight.shape[1])
    first = _choose(shape, weight.dtype, dtype) if weight.numel() >= _WORTH_A_TRIAL else _as_native
    second = _as_onednn if first is _as_native else _as_native
    return first(weight, dtype) or second(weight, dtype)


def _as_native(weight: torch.Tensor, dtype: torch.dtype) -> Linear | None:
    if load() is None:
        return None
    native = NativeLinear(weight)
    return native if products_agree(native, PlainLinear(weight.to(dtype))) else None


def _as_onednn(weight: torch.Tensor, dtype: torch.dtype) -> Linear | None:
    weight = weight.to(dtype)  # oneDNN multiplies weights of the inputs' dtype alone
    try:
        packed = PackedLinear(weight)
        return packed if products_agree(packed, PlainLinear(weight)) else None
    except (AttributeError, RuntimeError, TypeError):  # no such operator, not on this CPU, other arguments
        return None


@cache
def _choose(shape: tuple[int, int], held: torch.dtype, dtype: torch.dtype) -> Callable[..., Linear | None]:
    """The faster maker for weights of about a shape, measured here once. Ours, unless oneDNN's is clearly faster."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(held)
    ours, theirs = _as_native(weight, dtype), _as_onednn(weight, dtype)
    if ours is None or theirs is None:
        return _as_native if theirs is None else _as_onednn
    ratios = []
    for num_rows in _TRIED_ROWS:
        x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        ratios.append(_seconds(ours, x) / _seconds(theirs, x))
    mean = math.prod(ratios) ** (1 / len(ratios))
    return _as_onednn if mean > _CLEARLY_FASTER else _as_native


def _seconds(layer: Linear, x: torch.Tensor) -> float:
    """The shortest of a few calls."""
    found = []
    for _ in range(4):
        start = time.perf_counter()
        layer(x)
        found.append(time.perf_counter() - start)
    return min(found)

"""The linear layers of the engine: one interface, and `make_linear`, which chooses the kind of layer behind it.

Legend: N rows (packed tokens), I input width, O output width. A layer may be several matrices laid end to end by rows
(query, key and value; gate and up), so that one product reads the input once.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from alpaca.errors import InputError
from alpaca.formats.hf.quantization import INT8_STEP, AnyWeight, Int8Weight, Nf4Weight, place_end_to_end, quantize_parts
from alpaca.serving.kernels.cpu_linear import NativeLinear, held_dtype, make_packed
from alpaca.serving.kernels.linear_base import Linear, PlainLinear, is_close
from alpaca.serving.kernels.native.library import load as load_native

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_FEW_ROWS_CUDA = 64  # above, the tensor cores are the limit and not the reading of the weights
_FEW_ROWS_CPU = 32
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # of a dequantised block: what stays in a cache; 128 MiB of a GPU


class Int8Linear(Linear):
    """int8 weights with a scale per row; the inputs are not quantized.

    On a GPU our kernels read each weight once. On a CPU torch multiplies few bfloat16 rows with int8 weights directly,
    3 to 7 times as fast as the general way, which dequantises a block of weight rows at a time.
    """

    def __init__(self, weight: Int8Weight) -> None:
        self._weight = weight
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.num_bytes
        self._kernels = _load_kernels(weight.codes.device)
        self._ones = torch.ones(self.out_features, dtype=torch.bfloat16, device=weight.codes.device)
        # torch's kernel reads 16 columns at a time and does not check: another width is a segmentation fault
        self._is_fused = weight.codes.device.type == "cpu" and weight.shape[1] % 32 == 0 and _fused_int8_agrees(self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels and x.dtype in _KERNEL_DTYPES:
            if x.shape[0] <= _FEW_ROWS_CUDA:
                return self._kernels.multiply_int8(x, self._weight)
            return _multiply_by_row_blocks(x, self._weight, self._kernels.dequantize_int8)
        if self._is_fused and x.dtype == torch.bfloat16 and x.shape[0] <= _FEW_ROWS_CPU:
            return self._multiply_fused(x)
        return _multiply_by_row_blocks(x, self._weight)

    def _multiply_fused(self, x: torch.Tensor) -> torch.Tensor:
        # The operator takes scales in bfloat16, which rounds them by up to 0.2 %. So they are multiplied afterwards.
        x = x.contiguous()
        if x.data_ptr() % 64:
            x = x.clone()  # the kernel's loads are aligned ones: from another address they are a segmentation fault
        products = torch._weight_int8pack_mm(x, self._weight.codes, self._ones)
        return (products * (self._weight.absmax * INT8_STEP)).to(x.dtype)


class Nf4Linear(Linear):
    """4-bit NF4 weights with a scale for each 64 of them; the inputs are not quantized.

    On a GPU our kernels read each weight once if 64 divides the input width. Otherwise blocks of rows are dequantised.
    """

    def __init__(self, weight: Nf4Weight) -> None:
        self._weight = weight
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.num_bytes
        self._kernels = _load_kernels(weight.packed.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is None or x.dtype not in _KERNEL_DTYPES:
            return _multiply_by_row_blocks(x, self._weight)
        if x.shape[0] <= _FEW_ROWS_CUDA and self._weight.row_step == 1:
            return self._kernels.multiply_nf4(x, self._weight)
        return _multiply_by_row_blocks(x, self._weight, self._kernels.dequantize_nf4)


class SideBySide(Linear):
    """Several layers of one input whose outputs are put side by side, for weights that cannot be laid end to end."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = list(layers)
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.num_bytes = sum(layer.num_bytes for layer in layers)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self._layers], dim=1)


def make_linear(
    parts: Sequence[torch.Tensor | Int8Weight | Nf4Weight],
    *,
    quantization: str,
    device: torch.device,
    dtype: torch.dtype,
    held: torch.dtype | None = None,
) -> Linear:
    """The layer for the matrices `parts`, each [O_i, I] on any device and of any float dtype, laid end to end by rows.

    Parts may be memory-mapped; they are read one after the other and not kept, except that a single part already of
    `device` and `dtype` is used as it is. Each part is quantised by itself, on `device`, from the dtype it has: as
    bitsandbytes would. Packing holds the layer twice for a moment. Parts that were saved as int8 or nf4 stay so.
    held: the dtype of the weight that is not quantized, on a CPU; None: of its parts where that loses nothing.
    Raises InputError for another quantization, and for parts that do not fit together.
    """
    widths = {part.shape[1] for part in parts if len(part.shape) == 2}
    if len(widths) != 1 or any(len(part.shape) != 2 for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts) or "none"
        raise InputError(f"a linear layer needs matrices of one input width; found {shapes}")
    if not all(isinstance(part, torch.Tensor) for part in parts):
        return _keep_quantized(parts, quantization=quantization, device=device, dtype=dtype, held=held)
    if quantization == "none":
        if held is None:
            held = held_dtype({part.dtype for part in parts}, dtype) if device.type == "cpu" else dtype
        weight = lay_end_to_end(parts, device=device, dtype=held)
        return make_packed(weight, dtype) or PlainLinear(weight.to(dtype))
    if quantization == "int8":
        return make_int8(quantize_parts(parts, quantization="int8", device=device), dtype)
    if quantization == "nf4":
        return make_nf4(parts, device)
    raise InputError(f"quantization must be none, int8 or nf4; found {quantization!r}")


def _keep_quantized(
    parts: Sequence[torch.Tensor | Int8Weight | Nf4Weight],
    *,
    quantization: str,
    device: torch.device,
    dtype: torch.dtype,
    held: torch.dtype | None,
) -> Linear:
    """The layer for parts of which some were saved quantized: one of all where they are of one kind, else one each."""
    if all(isinstance(part, Int8Weight) for part in parts):
        return make_int8(place_end_to_end(parts, device), dtype)
    ends_fit = all(math.prod(part.shape) % 64 == 0 for part in parts[:-1])
    if ends_fit and all(isinstance(part, Nf4Weight) for part in parts):
        return Nf4Linear(place_end_to_end(parts, device))
    alone = [make_linear([part], quantization=quantization, device=device, dtype=dtype, held=held) for part in parts]
    return SideBySide(alone)


def make_int8(weight: Int8Weight, dtype: torch.dtype) -> Linear:
    """The layer for an int8 weight, for inputs of `dtype`. Our C++ kernel multiplies float32 alone."""
    if weight.codes.device.type == "cpu" and dtype == torch.float32 and load_native():
        return NativeLinear(weight.codes, weight.absmax * INT8_STEP)
    return Int8Linear(weight)


def make_nf4(parts: Sequence[torch.Tensor], device: torch.device) -> Linear:
    """One layer of the parts end to end, or one layer each if some block of 64 weights would span two parts."""
    if all(part.numel() % 64 == 0 for part in parts[:-1]):
        return Nf4Linear(quantize_parts(parts, quantization="nf4", device=device))
    return SideBySide([Nf4Linear(quantize_parts([part], quantization="nf4", device=device)) for part in parts])


def lay_end_to_end(parts: Sequence[torch.Tensor], *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Join parts [O_i, I] to one weight [O, I] of `dtype` on `device`. Needs memory for it and one part at once."""
    if len(parts) == 1:
        return parts[0].detach().to(device=device, dtype=dtype).contiguous()
    whole = torch.empty(sum(part.shape[0] for part in parts), parts[0].shape[1], device=device, dtype=dtype)
    row = 0
    for part in parts:
        whole[row : row + part.shape[0]].copy_(part.detach())
        row += part.shape[0]
    return whole


def _load_kernels(device: torch.device) -> ModuleType | None:
    """Our Triton kernels, if the device is a GPU and Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from alpaca.serving.kernels import triton_linear

    return triton_linear


def _multiply_by_row_blocks(
    x: torch.Tensor, weight: AnyWeight, dequantize: Callable[[AnyWeight, torch.dtype], torch.Tensor] | None = None
) -> torch.Tensor:
    """x [N, I] -> [N, O], with no more than one block of the weight dequantised at a time."""
    dequantize = dequantize or type(weight).dequantize
    num_rows, width = weight.shape
    step = max(1, _BLOCK_ELEMENTS[x.device.type] // (width * weight.row_step)) * weight.row_step
    if step >= num_rows:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype))
    out = x.new_empty(x.shape[0], num_rows)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        out[:, start:stop] = torch.nn.functional.linear(x, dequantize(weight.rows(start, stop), x.dtype))
    return out


def _fused_int8_agrees(layer: Int8Linear) -> bool:
    """Whether torch's private product of bfloat16 and int8 exists, takes this shape, and gives the right numbers."""
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    try:
        found = layer._multiply_fused(x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return is_close(found, _multiply_by_row_blocks(x.float(), layer._weight))

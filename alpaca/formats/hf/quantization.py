"""8-bit and 4-bit weights, in bitsandbytes' formats: its own layers for training, and the formats alone for serving.

What is quantised here equals bitsandbytes' bit for bit (0.50 on a CPU), without needing it.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from alpaca.errors import InputError, MissingPackage


def bitsandbytes_config(quantization: str, compute_dtype: torch.dtype, *, storage_dtype: torch.dtype = torch.uint8):
    """transformers' config for loading a model's linear layers as "int8" or "nf4"; None for "none".

    storage_dtype: under which nf4's bytes go; FSDP shards them only under the float dtype it computes in.
    Raises InputError for another name, MissingPackage without bitsandbytes or without its part for this GPU.
    """
    if quantization == "none":
        return None
    if quantization not in ("int8", "nf4"):
        raise InputError(f"quantization must be none, int8 or nf4; found {quantization!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage(f"quantization {quantization} needs bitsandbytes: pip install bitsandbytes")
    if torch.cuda.is_available():
        _require_gpu_library()
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype,
    )


def _require_gpu_library() -> None:
    """bitsandbytes says only in its first call that it found no library for the GPU, or fails there without a word."""
    from bitsandbytes.cextension import lib

    if not lib.compiled_with_cuda:
        raise MissingPackage(
            f"bitsandbytes has no library for CUDA {torch.version.cuda} here and would load the CPU's: install a "
            "version that has one (requirements.txt has the tested one), or use --method lora or no quantization"
        )


def allow_any_width_on_cpu(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights of a shape that its CPU packing cannot take.

    On CPUs with AVX512-BF16 the first forward pass without gradients repacks them in tiles of 32 rows and 64 columns,
    and fails on layers these do not divide.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and (module.out_features % 32 or module.in_features % 64):
            module.support_avx512bf16_for_cpu = False


def keep_trainable_on_cpu(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking any 4-bit weight of a model that is trained.

    Weights repacked by a forward pass without gradients (an evaluation) let none through afterwards: on CPUs with
    AVX512-BF16 the adapters below them would stop learning, silently.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def require_readable_on_cpu(model: torch.nn.Module) -> None:
    """Raise InputError where bitsandbytes on a CPU reads a 4-bit weight as another than it stored.

    0.50.2 does so for some widths that its blocks of 64 do not divide (32, 48, 96, 176; not 172): a relative error of
    0.2 to 0.4 instead of 0.09, without a word. No released LLaMA, OPT or BLOOM has such a width.
    """
    import bitsandbytes

    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit) or module.in_features % _BLOCK == 0:
            continue
        state, data = module.weight.quant_state, module.weight.data
        scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        stored = Nf4Weight(data.reshape(-1).view(torch.uint8), scales.float(), tuple(state.shape))
        read = bitsandbytes.functional.dequantize_4bit(data, state).float()
        if not torch.allclose(read, stored.dequantize(torch.float32), atol=1e-2 * float(scales.max())):
            raise InputError(
                f"bitsandbytes reads 4-bit weights of this width wrongly on a CPU: {name} has {module.in_features} "
                f"columns, no multiple of {_BLOCK}; use int8 or no quantization, or a GPU"
            )


# --- The storage formats themselves, without bitsandbytes. Legend: O output rows, I input width, E = O * I elements.

_CHUNK_ELEMENTS = 2**22  # float32 copies of a weight exist for this many elements at a time, never for all of it
INT8_STEP = 7.874015718698502e-3  # 1/127 rounded to float32, as bitsandbytes writes it
_BLOCK = 64  # elements of the flattened weight that share a scale
_GROUP = 256  # scales that share a scale of their own
_SMALLEST_SCALE = 1e-38  # keeps the reciprocal of a block of zeros finite
_CPU_GRID = 65535  # steps of [-1, 1] that bitsandbytes' CPU code rounds to before it looks the nearest value up

# Quantiles of the normal distribution, QLoRA (arXiv 2305.14314) appendix E.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Int8Weight:
    """A weight [O, I] as int8 `codes` [O, I] (bitsandbytes' CB) and float32 `absmax` [O] (SCB), one per row."""

    codes: torch.Tensor
    absmax: torch.Tensor

    row_step = 1  # rows can be cut anywhere

    @classmethod
    def empty(cls, num_rows: int, width: int, device: torch.device) -> "Int8Weight":
        """Memory for a weight [num_rows, width]."""
        codes = torch.empty(num_rows, width, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(num_rows, dtype=torch.float32, device=device))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def rows(self, start: int, stop: int) -> "Int8Weight":
        """Rows `start` to `stop`, sharing memory."""
        return Int8Weight(self.codes[start:stop], self.absmax[start:stop])

    def copy_(self, other: "Int8Weight") -> None:
        """Take another's codes and scales, from any device."""
        self.codes.copy_(other.codes)
        self.absmax.copy_(other.absmax)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I] that the codes stand for."""
        return (self.codes * self.absmax[:, None] * INT8_STEP).to(dtype)


@dataclass(frozen=True)
class Nf4Weight:
    """A weight [O, I] as NF4 codes, two in each byte of `packed` [ceil(E / 2)], the high nibble first.

    `absmax` [ceil(E / 64)] are the float32 scales after bitsandbytes' double quantisation was undone: 0.37 bit more per
    weight than keeping them nested, and one look-up less for each block in every product.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def empty(cls, num_rows: int, width: int, device: torch.device) -> "Nf4Weight":
        """Memory for a weight [num_rows, width]."""
        packed = torch.empty(-(-num_rows * width // 2), dtype=torch.uint8, device=device)
        absmax = torch.empty(-(-num_rows * width // _BLOCK), dtype=torch.float32, device=device)
        return cls(packed, absmax, (num_rows, width))

    @property
    def row_step(self) -> int:
        """Rows can be cut where a block ends: after every so many of them."""
        return _BLOCK // math.gcd(_BLOCK, self.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    def rows(self, start: int, stop: int) -> "Nf4Weight":
        """Rows `start` to `stop`, sharing memory. Raises InputError where a block would be cut."""
        if start % self.row_step or (stop % self.row_step and stop < self.shape[0]):
            raise InputError(
                f"nf4 weights of width {self.shape[1]} have blocks of {_BLOCK} that end after every "
                f"{self.row_step} rows; found rows {start} to {stop}"
            )
        first, last = start * self.shape[1], stop * self.shape[1]
        absmax = self.absmax[first // _BLOCK : -(-last // _BLOCK)]
        return Nf4Weight(self.packed[first // 2 : -(-last // 2)], absmax, (stop - start, self.shape[1]))

    def copy_(self, other: "Nf4Weight") -> None:
        """Take another's codes and scales, from any device."""
        self.packed.copy_(other.packed)
        self.absmax.copy_(other.absmax)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I] that the codes stand for."""
        # index_select was 2.5 times as fast as indexing
        pairs = _byte_values(self.packed.device).index_select(0, self.packed.int())
        values = _scale_blocks(pairs.view(torch.float32), self.absmax)
        return values[: self.shape[0] * self.shape[1]].view(self.shape).to(dtype)


AnyWeight = TypeVar("AnyWeight", Int8Weight, Nf4Weight)


def quantize_parts(parts: Sequence[torch.Tensor], *, quantization: str, device: torch.device) -> Int8Weight | Nf4Weight:
    """Matrices [O_i, I] quantised "int8" or "nf4" on `device`, each by itself, and laid end to end by rows.

    No more is held than the result and one part. Raises InputError where an nf4 block would straddle two parts.
    """
    kind, quantize = (Int8Weight, quantize_int8) if quantization == "int8" else (Nf4Weight, quantize_nf4)
    whole = kind.empty(sum(part.shape[0] for part in parts), parts[0].shape[1], device)
    row = 0
    for part in parts:
        quantize(part.to(device), whole.rows(row, row + part.shape[0]))
        row += part.shape[0]
    return whole


def place_end_to_end(parts: Sequence[AnyWeight], device: torch.device) -> AnyWeight:
    """Quantized matrices [O_i, I] of one kind on `device`, laid end to end by rows, each bit as it was.

    Raises InputError where an nf4 block would straddle two parts.
    """
    whole = type(parts[0]).empty(sum(part.shape[0] for part in parts), parts[0].shape[1], device)
    row = 0
    for part in parts:
        whole.rows(row, row + part.shape[0]).copy_(part)
        row += part.shape[0]
    return whole


def quantize_int8(weight: torch.Tensor, out: Int8Weight | None = None) -> Int8Weight:
    """weight [O, I] as bitsandbytes' Int8Params stores it: rounded to float16, then each row to 127ths of its largest.

    Written into `out` where given. Raises InputError where a value is not finite in float16 (above 65504): its row
    would be lost.
    """
    num_rows, width = weight.shape
    out = out or Int8Weight.empty(num_rows, width, weight.device)
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, num_rows, step):
        rows = weight[start : start + step].detach().to(torch.float16).float()
        largest = rows.abs().amax(dim=1)
        scaled = rows * (127.0 / largest)[:, None]
        out.codes[start : start + step] = scaled.round_().nan_to_num_(nan=0.0)  # a row of zeros: 0 * inf
        out.absmax[start : start + step] = largest
    _check_finite(out.absmax, "int8 weights must be finite in float16, at most 65504")
    return out


def quantize_nf4(weight: torch.Tensor, out: Nf4Weight | None = None) -> Nf4Weight:
    """weight [O, I] as bitsandbytes' Params4bit stores it: nf4, blocks of 64, with double quantisation.

    On a CPU and on a GPU bitsandbytes rounds some scales differently; this follows it on the weight's device.
    Written into `out` where given. Raises InputError where a value is not finite.
    """
    out = out or Nf4Weight.empty(weight.shape[0], weight.shape[1], weight.device)
    flat = weight.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        codes, scales = _encode_nf4(flat[start : start + _CHUNK_ELEMENTS].float())
        out.absmax[start // _BLOCK : start // _BLOCK + scales.numel()] = scales
        out.packed[start // 2 : start // 2 + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
    _check_finite(out.absmax, "nf4 weights must be finite")
    out.absmax.copy_(_round_scales(out.absmax))
    return out


def _check_finite(absmax: torch.Tensor, expected: str) -> None:
    if not bool(absmax.isfinite().all()):
        raise InputError(f"{expected}; found {absmax[~absmax.isfinite()][0].item()}")


def _encode_nf4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [E] -> codes uint8 [E or E + 1, even] and scales float32 [ceil(E / 64)]."""
    full = values.numel() // _BLOCK * _BLOCK
    blocks, rest = values[:full].view(-1, _BLOCK), values[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_SCALE))[:, None]).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=_SMALLEST_SCALE)
        absmax = torch.cat([absmax, last[None]])
        # bitsandbytes divides here on a CPU: another rounding than the reciprocal above
        scaled = torch.cat([scaled, rest / last if rest.is_cpu else rest * (1.0 / last)])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    return torch.bucketize(scaled.clamp_(-1, 1), _nf4_bounds(values.device), out_int32=True).to(torch.uint8), absmax


def _round_scales(absmax: torch.Tensor) -> torch.Tensor:
    """What is left of the scales [S] after bitsandbytes stores them as 8-bit differences from their mean."""
    offset = absmax.mean()
    groups = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % _GROUP)).view(-1, _GROUP)
    largest = groups.abs().amax(dim=1, keepdim=True)
    scaled = (groups * (1.0 / largest.clamp(min=_SMALLEST_SCALE))).clamp_(-1, 1)
    if scaled.is_cpu:
        steps = ((scaled + 1) * 0.5 * _CPU_GRID + 0.5).trunc_()
        scaled = steps * 2 / _CPU_GRID - 1
    values = dynamic_map().to(absmax.device)
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)
    return (values[codes] * largest).view(-1)[: absmax.numel()] + offset


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 float32 values of bitsandbytes' signed dynamic 8-bit type, ascending (arXiv 2110.02861).

    Decade by decade below 1 there are 1, 2, 4 ... 64 values of each sign, at the middles of equal steps; and 0, and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-middle for middle in middles]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _nf4_bounds(device: torch.device) -> torch.Tensor:
    """The middles between neighbouring values: a number belongs to the code counting those below it. float32 [15]."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)
    return (values[:-1] + values[1:]) / 2


@cache
def _byte_values(device: torch.device) -> torch.Tensor:
    """The two float32 values of each byte, as one int64: a single look-up decodes both. int64 [256]."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float32)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    return pairs.view(torch.int64).view(256).to(device)


def _scale_blocks(values: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Each block of 64 values [E] times its scale [ceil(E / 64)], in place: [E]."""
    full = values.numel() // _BLOCK * _BLOCK
    values[:full].view(-1, _BLOCK).mul_(absmax[: full // _BLOCK, None])
    values[full:].mul_(absmax[-1])
    return values

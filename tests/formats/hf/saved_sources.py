"""Weights quantized and packed the slow way, bit by bit, in the layouts that other programs save.

Nothing here uses the project's code: it is what the project's readers are held against.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
GROUP = 16


def pack_rows(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Unsigned integers [R, N] -> int32 words [R, ceil(N bits / 32)]: one stream of bits a row, lowest first."""
    num_rows, count = values.shape
    words = torch.zeros(num_rows, -(-count * num_bits // 32), dtype=torch.int64)
    for number in range(count):
        for bit in range(num_bits):
            place = number * num_bits + bit
            words[:, place // 32] |= (values[:, number].long() >> bit & 1) << place % 32
    return torch.where(words >= 2**31, words - 2**32, words).int()


# What GPTQModel takes from the words of packed zeros for its first format, as its source has them, in turn by column.
WORD_ONES = {
    2: [0b01010101010101010101010101010101],
    3: [0b00100100100100100100100100100100, 0b10010010010010010010010010010010, 0b01001001001001001001001001001001],
    4: [0b00010001000100010001000100010001],
    8: [0b00000001000000010000000100000001],
}


def less_ones(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Words of packed zeros, each less its constant in unsigned arithmetic of 32 bits, by Python's whole numbers."""
    ones = WORD_ONES[num_bits]
    rows = [[(word - ones[at % len(ones)]) % 2**32 for at, word in enumerate(row)] for row in words.tolist()]
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in rows]).int()


def gptq(
    weight: torch.Tensor, *, num_bits: int = 4, in_order: bool = True, stored: str = "less ones"
) -> tuple[Tensors, torch.Tensor]:
    """A matrix [O, I] as GPTQ's tensors, and what they stand for.

    stored: the zero points as they are ("plain"), by words ("less ones", GPTQModel's), or each less one ("less one",
    AutoGPTQ's, in which a zero point of 0 has no place).
    """
    num_rows, width = weight.shape
    generator = torch.Generator().manual_seed(num_rows + width)
    group = torch.arange(width) // GROUP
    if not in_order:
        group = group[torch.randperm(width, generator=generator)]
    scales = (torch.rand(width // GROUP, num_rows, generator=generator) * 0.05 + 0.01).half()
    zeros = torch.randint(int(stored == "less one"), 2**num_bits, (width // GROUP, num_rows), generator=generator)
    codes = (weight.t() / scales.float()[group] + zeros[group]).round().clamp(0, 2**num_bits - 1).int()
    stands_for = (scales[group] * (codes - zeros[group]).half()).t()
    packed = pack_rows(zeros - int(stored == "less one"), num_bits)
    tensors = {
        "qweight": pack_rows(codes.t(), num_bits).t(),
        "qzeros": less_ones(packed, num_bits) if stored == "less ones" else packed,
        "scales": scales,
        "g_idx": group.int(),
    }
    return tensors, stands_for


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A matrix [O, I] as AWQ's tensors: of eight outputs 0 2 4 6 1 3 5 7 stand in a word, lowest bits first."""
    num_rows, width = weight.shape
    generator = torch.Generator().manual_seed(num_rows * width)
    scales = (torch.rand(width // GROUP, num_rows, generator=generator) * 0.05 + 0.01).half()
    zeros = torch.randint(0, 16, (width // GROUP, num_rows), generator=generator)
    group = torch.arange(width) // GROUP
    codes = (weight.t() / scales.float()[group] + zeros[group]).round().clamp(0, 15).int()

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        return values.view(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(values), -1)

    tensors = {
        "qweight": pack_rows(interleaved(codes), 4),
        "qzeros": pack_rows(interleaved(zeros), 4),
        "scales": scales,
    }
    return tensors, ((codes - zeros[group]).half() * scales[group]).t()


def packed_integers(weight: torch.Tensor, *, symmetric: bool = True) -> tuple[Tensors, torch.Tensor]:
    """A matrix [O, I] as compressed-tensors' "pack-quantized" has it: 4 bit, scales by groups of columns."""
    num_rows, width = weight.shape
    generator = torch.Generator().manual_seed(num_rows - width)
    scale = (torch.rand(num_rows, width // GROUP, generator=generator) * 0.05 + 0.01).bfloat16()
    zero = torch.zeros_like(scale) if symmetric else torch.randint(-8, 8, scale.shape, generator=generator)
    spread = torch.arange(width) // GROUP
    codes = (weight / scale.float()[:, spread] + zero[:, spread]).round().clamp(-8, 7).int()
    tensors = {
        "weight_packed": pack_rows(codes + 8, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_rows((zero + 8).t(), 4).t()
    return tensors, (codes.bfloat16() - zero[:, spread].bfloat16()) * scale[:, spread]


def int8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A matrix as compressed-tensors' "int-quantized" has it: int8, a scale a row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def float8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A matrix as compressed-tensors' "float-quantized" has it: 8-bit floats, a scale a row."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.bfloat16() * scale


def float8_blocks(weight: torch.Tensor, *, size: int = 32) -> tuple[Tensors, torch.Tensor]:
    """A matrix as DeepSeek saves it: 8-bit floats, a float32 scale for each square block; the last may be cut off."""
    num_rows, width = weight.shape
    rows, columns = torch.arange(num_rows) // size, torch.arange(width) // size
    scale = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for row in range(len(scale)):
        for column in range(scale.shape[1]):
            scale[row, column] = weight[rows == row][:, columns == column].abs().max() / 448
    whole = scale[rows][:, columns]
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * whole


def float8_blocks_compressed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The same, by compressed-tensors' name of the scales."""
    tensors, stands_for = float8_blocks(weight)
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"]}, stands_for


def float8_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A matrix as AutoFP8 saves it: 8-bit floats, a scale for all of it, and one for its layer's input."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.7)}, codes.float() * scale


def compressed_config(layout: str, kind: str, num_bits: int, **weights: object) -> dict[str, object]:
    how = {"type": kind, "num_bits": num_bits, "strategy": "channel", "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": how, "format": layout}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


# kind -> the layout of one matrix, and config.json's quantization_config
FORMATS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "gptq, columns in another order": (
        lambda weight: gptq(weight, in_order=False),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    ),
    "gptq, 2 bit": (lambda weight: gptq(weight, num_bits=2), {"quant_method": "gptq", "bits": 2, "group_size": GROUP}),
    "gptq, 8 bit": (lambda weight: gptq(weight, num_bits=8), {"quant_method": "gptq", "bits": 8, "group_size": GROUP}),
    "gptq, 3 bit, AutoGPTQ's": (
        lambda weight: gptq(weight, num_bits=3, stored="less one"),
        {"quant_method": "gptq", "bits": 3, "group_size": GROUP},
    ),
    "gptq, 3 bit, GPTQModel's": (
        lambda weight: gptq(weight, num_bits=3),
        {"quant_method": "gptq", "bits": 3, "group_size": GROUP, "meta": {"quantizer": ["gptqmodel:1.7.0"]}},
    ),
    "gptq_v2, 8 bit": (
        lambda weight: gptq(weight, num_bits=8, stored="plain"),
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "compressed w4a16": (
        packed_integers, compressed_config("pack-quantized", "int", 4, strategy="group", group_size=GROUP),
    ),
    "compressed w4a16, with zeros": (
        lambda weight: packed_integers(weight, symmetric=False),
        compressed_config("pack-quantized", "int", 4, strategy="group", group_size=GROUP, symmetric=False),
    ),
    "compressed w8a8": (int8_rows, compressed_config("int-quantized", "int", 8)),
    "compressed fp8": (float8_rows, compressed_config("float-quantized", "float", 8)),
    "compressed fp8 by blocks": (
        float8_blocks_compressed, compressed_config("float-quantized", "float", 8, block_structure=[32, 32]),
    ),
    "compressed fp8 by blocks in words": (
        float8_blocks_compressed, compressed_config("float-quantized", "float", 8, block_structure="32x32"),
    ),
    "AutoFP8": (float8_tensor, {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}),
    "fp8 by blocks": (float8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
}  # fmt: skip


def save_quantized(source: Path, target: Path, kind: str) -> Tensors:
    """Copy a folder with the matrices of its layers quantized; what they stand for, by the whole model's names."""
    layout, how = FORMATS[kind]
    target.mkdir(exist_ok=True)
    stored: Tensors = {}
    whole: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            parts, whole[name] = layout(tensor.float())
            stored |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = whole[name] = tensor
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": how}
    (target / "config.json").write_text(json.dumps(config))
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (target / file.name).write_bytes(file.read_bytes())
    return whole

"""8-bit and 4-bit weights, in bitsandbytes' formats."""

import importlib.util

import torch

from alpaca.errors import InputError, MissingPackage


def bitsandbytes_config(quantization: str, compute_dtype: torch.dtype):
    """transformers' config for loading a model's linear layers as "int8" or "nf4"; None for "none".

    Raises InputError for another name, MissingPackage without bitsandbytes.
    """
    if quantization == "none":
        return None
    if quantization not in ("int8", "nf4"):
        raise InputError(f"quantization must be none, int8 or nf4; found {quantization!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage(f"quantization {quantization} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
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

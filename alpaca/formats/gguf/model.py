"""A LLaMA as llama.cpp has it: which models it computes, its tensors' types, and its rotary numbers. Pure.

llama.cpp rotates adjacent pairs of a head, as Meta does, and Hugging Face its two halves. Of rope types it knows linear
by a factor, and Llama 3.1's as a divisor for each pair's frequency, stored as a tensor.
"""

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.tensors import Shape
from alpaca.formats.hf.saved.unpacking import why_unread

_ROPE_TYPES = ("default", "linear", "llama3")
_OTHER_WAY = "convert it with convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp"


def supports(model: ModelDescription) -> str | None:
    """Why this export cannot write a model, and what can, or None where it can."""
    if model.model_type != "llama":
        return f"its model_type is {model.model_type!r}, not llama: {_OTHER_WAY}"
    if model.unusual:
        return f"its {model.unusual[0]} asks for what llama.cpp's LLaMA does not compute"
    if model.activation != "silu":
        return f"its hidden_act is {model.activation!r}; llama.cpp's LLaMA computes silu"
    if reason := why_unread(model.quantized_by):
        return f"it {reason}"
    if model.rope.kind not in _ROPE_TYPES:
        return f"its rope type {model.rope.kind!r} is not one of {', '.join(_ROPE_TYPES)}: {_OTHER_WAY}"
    return None


def rotary_divisors(model: ModelDescription) -> torch.Tensor:
    """What llama.cpp divides each pair's frequency by, [d/2] float32, for the rope type llama3."""
    frequencies = 1.0 / model.rope.theta ** (
        torch.arange(0, model.head_width, 2, dtype=torch.float64) / model.head_width
    )
    share = model.rope.kept_share(frequencies)
    return (1 / ((1 - share) / model.rope.numbers["factor"] + share)).float()


def kind_of(shape: Shape, outtype: str) -> str:
    """The type of a tensor in a file of `outtype`, as llama.cpp's converter chooses it."""
    if len(shape) == 1:
        return "f32"
    return "f16" if outtype == "q8_0" and shape[-1] % 32 else outtype

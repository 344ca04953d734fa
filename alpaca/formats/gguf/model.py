"""A LLaMA in Hugging Face's words and in llama.cpp's: sizes, tensors, rotary numbers. Pure but for config.json.

llama.cpp rotates adjacent pairs of a head, as Meta does, and Hugging Face its two halves. Of rope types it knows linear
by a factor, and Llama 3.1's as a divisor for each pair's frequency, stored as a tensor.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alpaca.errors import InputError
from alpaca.files.reading import read_json
from alpaca.formats.rope import read_rope

Shape = tuple[int, ...]
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_OTHER_WAY = "convert it with convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp"


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """A LLaMA's sizes and constants, as config.json has them; `rope`: its rotary numbers under transformers' names."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int
    vocab_size: int
    norm_eps: float
    max_context: int
    rope: dict[str, Any]
    ties_embeddings: bool
    attention_bias: bool
    mlp_bias: bool


def read_shape(folder: Path, *, added_rows: int = 0) -> LlamaShape:
    """The shape in config.json, its embedding longer by `added_rows`. Raises MissingInput, InputError."""
    values = read_json(folder / "config.json")
    _require_llama(values, folder)
    try:
        heads, width = values["num_attention_heads"], values["hidden_size"]
        shape = LlamaShape(
            width=width,
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_width=values.get("head_dim") or width // heads,
            ffn_width=values["intermediate_size"],
            vocab_size=values["vocab_size"] + added_rows,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            max_context=values.get("max_position_embeddings", 2048),
            rope=_rope_of(values, folder),
            ties_embeddings=bool(values.get("tie_word_embeddings", False)),
            attention_bias=bool(values.get("attention_bias")),
            mlp_bias=bool(values.get("mlp_bias")),
        )
    except KeyError as error:
        raise InputError(f"{folder / 'config.json'} has no {error}") from None
    if shape.head_width % 2 or shape.num_heads % shape.num_kv_heads:
        raise InputError(
            f"{folder / 'config.json'}: expected an even head_dim and num_attention_heads a multiple of "
            f"num_key_value_heads; found {shape.head_width}, {shape.num_heads} and {shape.num_kv_heads}"
        )
    return shape


def _require_llama(values: dict[str, Any], folder: Path) -> None:
    if values.get("model_type") != "llama":
        raise InputError(f"{folder} holds a model of type {values.get('model_type')!r}, not llama: {_OTHER_WAY}")
    if values.get("hidden_act", "silu") != "silu":
        raise InputError(f"{folder} has hidden_act {values['hidden_act']!r}; llama.cpp's LLaMA computes silu")
    if values.get("quantization_config"):
        raise InputError(
            f"{folder} was saved quantized; export the model it was made from (--outtype q8_0 quantizes to 8 bit)"
        )


def _rope_of(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The rotary numbers, of a type that llama.cpp has."""
    rope = read_rope(values)
    if rope["rope_type"] not in _ROPE_NUMBERS:
        known = ", ".join(_ROPE_NUMBERS)
        raise InputError(f"{folder} has rope type {rope['rope_type']!r}, expected one of {known}: {_OTHER_WAY}")
    for name in ("rope_theta", *_ROPE_NUMBERS[rope["rope_type"]]):
        if not isinstance(rope.get(name), int | float):
            raise InputError(
                f"{folder / 'config.json'}: rope type {rope['rope_type']!r} needs a number {name!r}; found {rope}"
            )
    return rope


def rotary_divisors(shape: LlamaShape) -> torch.Tensor:
    """By what llama.cpp divides each pair's frequency, [d/2] float32, for the rope type llama3.

    Waves longer than the old context / low_freq_factor are slowed by `factor`, short ones kept, between: mixed.
    Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
    """
    rope, d = shape.rope, shape.head_width
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / rope["factor"] + share)).float()


# Tensors ------------------------------------------------------------------------------------------------------


def expected_tensors(shape: LlamaShape) -> dict[str, Shape]:
    """Every tensor of the Hugging Face model and its shape: embedding, layers, norm, head."""
    width, ffn = shape.width, shape.ffn_width
    heads_width, kv_width = shape.num_heads * shape.head_width, shape.num_kv_heads * shape.head_width
    rows = {"self_attn.q_proj": heads_width, "self_attn.k_proj": kv_width, "self_attn.v_proj": kv_width}
    rows |= {"self_attn.o_proj": width, "mlp.gate_proj": ffn, "mlp.up_proj": ffn, "mlp.down_proj": width}
    columns = {"self_attn.o_proj": heads_width, "mlp.down_proj": ffn}
    layer: dict[str, Shape] = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    for name, num_rows in rows.items():
        layer[f"{name}.weight"] = (num_rows, columns.get(name, width))
        if shape.attention_bias if name.startswith("self_attn") else shape.mlp_bias:
            layer[f"{name}.bias"] = (num_rows,)
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab_size, width)}
    for number in range(shape.num_layers):
        tensors |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    tensors["model.norm.weight"] = (width,)
    if not shape.ties_embeddings:  # else llama.cpp, too, uses the embedding
        tensors["lm_head.weight"] = (shape.vocab_size, width)
    return tensors


def kind_of(shape: Shape, outtype: str) -> str:
    """The type of a tensor in a file of `outtype`, as llama.cpp's converter chooses it."""
    if len(shape) == 1:
        return "f32"
    return "f16" if outtype == "q8_0" and shape[-1] % 32 else outtype

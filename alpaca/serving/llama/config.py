"""A LLaMA's sizes and constants as the engine needs them, from config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alpaca.errors import InputError
from alpaca.files.reading import read_json

_ROPE_NUMBERS = {  # the types this engine knows, and what each needs beside rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class UnsupportedModelError(InputError):
    """Not a model this engine knows; transformers may."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A LLaMA's sizes and constants, from config.json in any of transformers' spellings."""

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

    @classmethod
    def read(cls, folder: Path) -> "LlamaConfig":
        """Raises UnsupportedModelError for another architecture, InputError for missing or impossible values."""
        values = read_json(folder / "config.json")
        _require_llama(values, folder)
        try:
            heads = values["num_attention_heads"]
            return cls(
                width=values["hidden_size"],
                num_layers=values["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=values.get("num_key_value_heads") or heads,
                head_width=values.get("head_dim") or values["hidden_size"] // heads,
                ffn_width=values["intermediate_size"],
                vocab_size=values["vocab_size"],
                norm_eps=values.get("rms_norm_eps", 1e-6),
                max_context=values.get("max_position_embeddings", 2048),
                rope=_rope_of(values),
                ties_embeddings=values.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise InputError(f"{folder / 'config.json'} has no {error}") from None

    @property
    def num_linear_weights(self) -> int:
        """Elements of the layers' projections: what quantization makes smaller."""
        attention = self.width * self.head_width * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.width * self.ffn_width)

    @property
    def num_other_weights(self) -> int:
        """Elements of embedding, head and norms."""
        tables = 1 if self.ties_embeddings else 2
        return tables * self.vocab_size * self.width + (2 * self.num_layers + 1) * self.width

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_width * dtype.itemsize


def _require_llama(values: dict[str, Any], folder: Path) -> None:
    if values.get("model_type") != "llama":
        raise UnsupportedModelError(f"{folder} holds a model of type {values.get('model_type')!r}, not llama")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise UnsupportedModelError(f"{folder} has {name}, which this engine does not know")
    if values.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"{folder} has hidden_act {values['hidden_act']!r}, this engine knows silu")
    if values.get("quantization_config"):
        raise UnsupportedModelError(f"{folder} was saved quantized; this engine quantizes whole weights itself")


def _rope_of(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope["rope_type"] not in _ROPE_NUMBERS:
        raise UnsupportedModelError(f"rope type {rope['rope_type']!r} is not one of {', '.join(_ROPE_NUMBERS)}")
    for name in ("rope_theta", *_ROPE_NUMBERS[rope["rope_type"]]):
        if not isinstance(rope.get(name), (int, float)):
            raise InputError(f"rope type {rope['rope_type']!r} needs a number {name!r} in config.json; found {rope}")
    return rope

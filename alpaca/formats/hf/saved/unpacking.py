"""Folders whose weights were saved quantized, read as whole tensors, one at a time: the methods, and the layer itself.

Methods that are not here are refused by name. What one of them needs is a module of this room, with a `find`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from alpaca.architecture.description import quantization_method
from alpaca.errors import InputError, MissingInput
from alpaca.formats.hf.folder import FLOAT_DTYPES, TensorSpec
from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight
from alpaca.formats.hf.saved import awq, bitsandbytes, block_fp8, compressed, gptq
from alpaca.formats.hf.saved.packed import Find, PackedWeight

_USUAL_DTYPE = torch.float16
_METHODS_WITH_CACHE_SCALES = ("compressed-tensors", "fp8")
METHODS: Mapping[str, Find] = {
    "bitsandbytes": bitsandbytes.find,
    "gptq": gptq.find,
    "awq": awq.find,
    "compressed-tensors": compressed.find,
    "fp8": block_fp8.find,
}


class Stored(Protocol):
    """What is read here of a folder's files."""

    path: Path

    @property
    def names(self) -> list[str]: ...

    def specs(self) -> list[TensorSpec]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


class UnpackedWeights:
    """The whole tensors of a folder whose config.json has a quantization_config; the methods of `folder.WeightsFolder`.

    dtype: what packed weights are unpacked into; None: the dtype of their own library, else config.json's.
    Raises InputError for a method that is not read here, and where the tensors are not those of the method.
    """

    def __init__(self, weights: Stored, config: Mapping[str, Any], *, dtype: torch.dtype | None = None) -> None:
        self.path, self._weights, self._dtype = weights.path, weights, dtype
        self.method, how = quantization_method(config), config["quantization_config"]
        if reason := why_unread(self.method):
            raise InputError(f"{self.path} {reason}")
        self._stored = {spec.name: spec for spec in weights.specs()}
        self._own_dtype = _config_dtype(config)
        found = METHODS[self.method](self._stored, weights.tensor, how, str(self.path))
        if not found:
            raise InputError(
                f"{self.path}: config.json says that it was saved quantized by {self.method}, and none of its tensors "
                "is: copy both again from one place, or take quantization_config out if the weights are whole"
            )
        self._packed = {packed.name: packed for packed in found}
        names = self._whole_names(found, () if _has_biases(config) else self._zero_biases())
        self._order = dict.fromkeys(names)  # experts make tens of thousands of them, each looked up by its name

    @property
    def names(self) -> list[str]:
        return list(self._order)

    def specs(self) -> list[TensorSpec]:
        """Every whole tensor's name, shape and dtype."""
        return [self._spec(name) for name in self._order]

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor, unpacked now."""
        if name in self._packed:
            return self._packed[name].unpack(self._spec(name).dtype)
        return self._read(name)

    def stored(self, name: str) -> torch.Tensor | Int8Weight | Nf4Weight:
        """One tensor as int8 or nf4 where it was saved so, else whole."""
        keep = self._packed[name].keep if name in self._packed else None
        return keep() if keep else self.tensor(name)

    def keeps(self, name: str) -> bool:
        """Whether `stored` gives a tensor as int8 or nf4."""
        return name in self._packed and self._packed[name].keep is not None

    def describe(self) -> str:
        """One line for a log."""
        stored = sum(spec.num_bytes for spec in self._stored.values())
        whole = sum(spec.num_bytes for spec in self.specs())
        kept = sum(packed.keep is not None for packed in self._packed.values())
        how = "which the LLaMA engine computes with as they are" if kept == len(self._packed) else "unpacked when read"
        return (
            f"saved quantized by {self.method}: {len(self._packed)} of {len(self._order)} tensors, {how}; "
            f"{stored / 1e9:.2f} GB in the files, {whole / 1e9:.2f} GB as whole tensors"
        )

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._order:
            raise MissingInput(f"{self.path} holds no tensor {name!r}")
        return self._weights.tensor(name)

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._packed:
            return self._stored[name]
        packed = self._packed[name]
        dtype = self._dtype or packed.dtype or self._own_dtype
        return TensorSpec(name=name, shape=packed.shape, dtype=dtype)

    def _zero_biases(self) -> list[str]:
        """Biases that GPTQ's first programs wrote for every layer, of zeros, in models that have none."""
        biases = [f"{name.removesuffix('weight')}bias" for name in self._packed]
        return [name for name in biases if name in self._stored and not self._weights.tensor(name).any()]

    def _whole_names(self, found: list[PackedWeight], biases: Iterable[str]) -> dict[str, None]:
        """The model's names in the files' order: a packed weight stands where its first part does."""
        packed_of = {part: packed.name for packed in found for part in packed.parts}
        unread = set(biases)
        unread |= set(compressed.cache_scales(self._stored)) if self.method in _METHODS_WITH_CACHE_SCALES else set()
        return dict.fromkeys(packed_of.get(name, name) for name in self._stored if name not in unread)


def why_unread(method: str) -> str:
    """Why weights that were saved quantized by a method cannot be read here, and what to do; "" where they can."""
    if not method or method in METHODS:
        return ""
    return (
        f"was saved quantized by {method}, which is not read here (only {', '.join(METHODS)} are): take the model that "
        "it was made from, or save it whole by the program that made it"
    )


def bitsandbytes_kind(config: Mapping[str, Any]) -> str:
    """ "int8", "nf4" or "fp4" where a folder's weights were saved by bitsandbytes; else "none"."""
    is_its_own = quantization_method(config) == "bitsandbytes"
    return bitsandbytes.saved_kind(config["quantization_config"]) if is_its_own else "none"


def saved_quantization(config: Mapping[str, Any]) -> str:
    """ "int8" or "nf4" where a folder's weights were saved as this project's own layers compute with; else "none"."""
    kind = bitsandbytes_kind(config)
    return kind if kind in ("int8", "nf4") else "none"


def _has_biases(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") != "llama" or bool(config.get("attention_bias") or config.get("mlp_bias"))


def _config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    return FLOAT_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), _USUAL_DTYPE)

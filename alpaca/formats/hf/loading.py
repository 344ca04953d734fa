"""Loads a folder as a model of transformers: training, the check of a merge, and the engine for all other models."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alpaca.architecture.description import quantization_method
from alpaca.errors import InputError, MissingPackage
from alpaca.files.reading import read_json
from alpaca.formats.hf.folder import loading_errors
from alpaca.formats.hf.pickled import Weights, open_model_weights, opens_as_stored
from alpaca.formats.hf.quantization import bitsandbytes_config
from alpaca.formats.hf.saved.unpacking import saved_quantization, why_unread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_causal_lm(
    folder: Path,
    *,
    dtype: torch.dtype,
    quantization: str = "none",
    storage_dtype: torch.dtype = torch.uint8,
    device_map: Mapping[str, Any] | None = None,
    unpacks: bool,
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """A folder's model, and what transformers says of its tensors (missing_keys, unexpected_keys).

    quantization: into which whole weights are quantized by bitsandbytes. Weights that were saved as just that stay as
    they are; others that were saved quantized are unpacked first (`unpacks`), or loaded as transformers does it.
    Raises InputError, MissingPackage.
    """
    config = read_json(folder / "config.json")
    method = quantization_method(config)
    is_same = method == "bitsandbytes" and saved_quantization(config) == quantization != "none"
    how = None if is_same else bitsandbytes_config(quantization, dtype, storage_dtype=storage_dtype)
    arguments = {"dtype": dtype, "output_loading_info": True, "device_map": device_map}
    if how is not None:  # None given by name would override the folder's own
        arguments["quantization_config"] = how
    try:
        model, found = _untied(*_load(folder, method, arguments, is_same=is_same, unpacks=unpacks))
    except torch.OutOfMemoryError:
        raise
    except loading_errors() as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    keep_score_cap(model)
    return model, found


def keep_score_cap(model: "PreTrainedModel") -> None:
    """Let a model whose config bounds attention's scores compute them plainly: the fused attention leaves that out."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def _load(
    folder: Path, method: str, arguments: dict[str, Any], *, is_same: bool, unpacks: bool
) -> tuple["PreTrainedModel", dict[str, Any]]:
    by_itself = is_same or (method and not unpacks and "quantization_config" not in arguments)
    if by_itself or opens_as_stored(folder):
        return _load_as_stored(folder, method, arguments)
    return _load_tensors(folder, open_model_weights(folder, dtype=arguments["dtype"]), arguments)


def _untied(model: "PreTrainedModel", found: dict[str, Any]) -> tuple["PreTrainedModel", dict[str, Any]]:
    """The model whose config says what transformers did: it ties a head anew, by the flag, whenever rows are added."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    return model, found


def _load_as_stored(folder: Path, method: str, arguments: dict[str, Any]) -> tuple["PreTrainedModel", dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **arguments)
    except ImportError as error:
        if not method:
            raise
        reason = " ".join(str(error).split())
        if why_unread(method) or "quantization_config" in arguments:
            raise MissingPackage(
                f"{folder} was saved quantized by {method}, for which transformers lacks a package here: {reason}"
            ) from error
        logger.warning("%s is unpacked, for transformers lacks a package for %s here: %s", folder, method, reason)
        return _load_tensors(folder, open_model_weights(folder, dtype=arguments["dtype"]), arguments)


def _load_tensors(
    folder: Path, weights: Weights, arguments: dict[str, Any]
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """The model with tensors that are read, renamed and unpacked here, each when transformers asks for it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{folder}: model_type {config.model_type!r} is no causal language model of transformers")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tensors = {name: LazyTensor(weights, name) for name in weights.names}
    model, found = kind.from_pretrained(None, config=config, state_dict=tensors, **arguments)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    return model, found


class LazyTensor:
    """A tensor that is read when it is indexed, as transformers reads those of safetensors files."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._weights.tensor(self._name)[index]  # type: ignore[index]

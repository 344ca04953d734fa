"""What must be known of a transformers model before it is served: its context, its rows, why it cannot be loaded."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from alpaca.errors import AlpacaError, InputError, MissingPackage, UnsupportedModel
from alpaca.files.reading import read_json
from alpaca.serving.engine import is_device_lost
from alpaca.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 2048  # for models that name none (BLOOM, Mamba)
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx",
    "context_length", "max_target_positions", "model_max_length",
)  # fmt: skip
_MOST_CONTEXT = 1 << 32
_SIZES = (
    "hidden_size", "d_model", "n_embd", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads",
    "n_head", "n_heads", "vocab_size",
)  # fmt: skip
_OBJECTS = ("rope_parameters", "rope_scaling", "quantization_config")
_PACKAGES = {"hqq": "hqq", "fbgemm": "fbgemm-gpu", "kernels": "kernels", "quark": "amd-quark"}  # whose errors name none
_SHOWN = 400  # characters of another program's error


@contextmanager
def naming_the_folder(folder: Path) -> Iterator[None]:
    """Turn what transformers raises for a folder into a sentence that names it: its content steers any code there.

    Raises MissingPackage where a package is missing, with the line that installs it, InputError else. Memory that does
    not suffice, a lost device and this project's own errors pass through.
    """
    try:
        yield
    except MissingPackage as error:
        raise MissingPackage(_in_short(error)) from error
    except ImportError as error:
        raise MissingPackage(f"{_describe(folder)} needs a package that is not here: {_in_short(error)}") from error
    except Exception as error:
        if isinstance(error, AlpacaError | torch.OutOfMemoryError) or is_device_lost(error):
            raise
        raise InputError(
            f"{_describe(folder)} cannot be loaded as a causal language model: {type(error).__name__}: "
            f"{_in_short(error)}"
        ) from error


def check_config(folder: Path) -> None:
    """Check the values of config.json that every type has, before transformers stumbles over them. Raises InputError.

    Sizes are whole numbers above 0. A context may be null or below 1: the model then has none of its own.
    """
    file = folder / "config.json"
    config = read_json(file)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InputError(f"{file}: expected the name of a type for 'model_type', found {kind!r}")
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            _check_values(part, file)


def _check_values(config: Mapping[str, Any], file: Path) -> None:
    for name in _SIZES:
        value = config.get(name, 1)
        if type(value) is not int or value < 1:
            raise InputError(f"{file}: expected a whole number from 1 for {name!r}, found {value!r}")
    for name in _CONTEXT_NAMES:
        value = config.get(name)
        if value is not None and not isinstance(value, int | float):
            raise InputError(f"{file}: expected a whole number from 1 for {name!r}, found {value!r}")
    for name in _OBJECTS:
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{file}: expected an object for {name!r}, found {value!r}")


def _describe(folder: Path) -> str:
    config = read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    return f"{folder} ({config.get('model_type')}{f', saved quantized by {method}' if method else ''})"


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split()) or "it says no more"
    if "ignore_mismatched_sizes" in text:
        text = "its weights have other shapes than its config.json says; they are not of one model"
    if isinstance(error, ImportError) and "pip install" not in text:
        named = [
            *re.findall(r"No module named '(\w+)", text),
            *(_PACKAGES[key] for key in _PACKAGES if key in text.lower()),
        ]
        text += f": pip install {named[0]}" if named else ""
    return text[:_SHOWN]


def count_rows(model: PreTrainedModel, folder: Path) -> int:
    """Tokens that the model can read and say. Raises UnsupportedModel for one that has no embedding of tokens."""
    ends = []
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            ends.append(find())
        except NotImplementedError:
            ends.append(None)
    rows = [weight.shape[0] for end in ends if (weight := getattr(end, "weight", None)) is not None]
    if not rows:
        raise UnsupportedModel(
            f"{folder}: a model of type {model.config.model_type} cannot be served: it has no embedding of tokens"
        )
    return min(rows)


def choose_context(model: PreTrainedModel, settings: ServerSettings) -> int:
    """Tokens of prompt and answer together: the setting's, cut to the model's; 2048 where neither says any."""
    own = _own_context(model)
    if own is None:
        chosen = settings.max_context or _DEFAULT_CONTEXT
        logger.info(
            "this %s model's config names no context: %d tokens are served (ALPACA_MAX_CONTEXT)",
            model.config.model_type, chosen,
        )  # fmt: skip
        return chosen
    if settings.max_context is not None and settings.max_context > own:
        logger.warning("ALPACA_MAX_CONTEXT %d is cut to the model's context of %d tokens", settings.max_context, own)
    return min(settings.max_context or own, own)


def _own_context(model: PreTrainedModel) -> int | None:
    """What the config names, at most what the embedding of positions has rows for; None where nothing is named.

    Null and numbers below 1 (XLNet says -1) name nothing.
    """
    config = model.config.get_text_config(decoder=True)
    named = [getattr(config, name, None) for name in _CONTEXT_NAMES]
    found = [value for value in named if isinstance(value, int) and 1 <= value <= _MOST_CONTEXT][:1]
    return min([*found, *_position_rows(model)], default=None)


def _position_rows(model: PreTrainedModel) -> list[int]:
    """Positions that RoBERTa's kind of embedding has: it counts them from behind the row of the padding."""
    tables = [
        module for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
    ]  # fmt: skip
    return [table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None]

"""The base of a run: its folder, the checks of that folder, and its tokenizer."""

import functools
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.architecture.inventory import check_tensors
from alpaca.errors import InputError, MissingInput, UnsupportedModel
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.hf.folder import FLOAT_DTYPES, find_fingerprint, has_safetensors, read_description
from alpaca.formats.hf.pickled import as_stored, open_model_weights
from alpaca.text.loading import load_tokenizer
from alpaca.text.tokenizer import PAD_TOKEN, Tokenizer, tokenizer_summary
from alpaca.training.configuration.settings import BaseSettings

logger = logging.getLogger(__name__)
_HUB_IGNORES = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "original/*"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What training starts from.

    folder: the base model's.    tokenizer: its own or the one named, for full fine-tuning with a padding token.
    dtype: that of most weights in the folder; the final weights get it, too, unless another is asked for.
    """

    folder: Path
    tokenizer: Tokenizer
    dtype: torch.dtype

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A digest of the base's tensors, or None where its weights are not safetensors files."""
        return find_fingerprint(self.folder)


def open_base(settings: BaseSettings) -> Base:
    """Find the base model and its tokenizer, without reading weights. Raises MissingInput, InputError."""
    folder = locate_model(settings.model, cache_dir=settings.cache_dir)
    if not (folder / "config.json").is_file():
        raise MissingInput(_no_model(folder))
    dtype = _weights_dtype(folder)
    _check_files(folder)
    tokenizer = load_tokenizer(_locate_tokenizer(settings, folder))
    if settings.needs_pad_token and tokenizer.add_pad_token():
        logger.info("added %s as id %d: the tokenizer had no padding token", PAD_TOKEN, tokenizer.pad_id)
    logger.info("tokenizer: %s", tokenizer_summary(tokenizer))
    return Base(folder=folder, tokenizer=tokenizer, dtype=dtype)


def _check_files(folder: Path) -> None:
    """Raise InputError where config.json cannot be meant, or the safetensors files hold other tensors than it says."""
    try:
        model = read_description(folder)
    except UnsupportedModel:  # whatever is wrong with it, transformers will say
        return
    if has_safetensors(folder):
        weights = open_model_weights(folder)
        shapes = {spec.name: spec.shape for spec in weights.specs()}
        check_tensors(as_stored(model, weights), shapes, where=str(folder))


def locate_model(name: str, *, cache_dir: str | None) -> Path:
    """A model's folder: `name` itself, or where the hub's model of that name was downloaded to. Raises MissingInput."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.parent.exists()
    if looks_local:
        raise MissingInput(_no_model(folder))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, ignore_patterns=_HUB_IGNORES))
    except Exception as error:  # hub, network and cache errors have no common class
        raise MissingInput(f"{_no_model(folder)}\n(nor could it be had from the Hugging Face hub: {error})") from error


def _no_model(folder: Path) -> str:
    return (
        f"no model at {folder} (found there: {list_folder(folder)}): expected a Hugging Face folder with config.json "
        "and weights; convert Meta's checkpoint first: python -m convert.convert_llama_weights_to_hf "
        "--input_dir unconverted-weights --model_size 7B --output_dir weights"
    )


def _locate_tokenizer(settings: BaseSettings, model_folder: Path) -> Path:
    if not settings.tokenizer:
        return model_folder
    return locate_model(settings.tokenizer, cache_dir=settings.cache_dir)


def _weights_dtype(folder: Path) -> torch.dtype:
    """The dtype of most of the folder's weights, by the safetensors headers; for older formats by config.json."""
    if has_safetensors(folder):
        sizes: Counter[torch.dtype] = Counter()
        for spec in open_model_weights(folder).specs():
            sizes[spec.dtype] += spec.num_bytes
        dtype = sizes.most_common(1)[0][0]
    else:
        config = read_json(folder / "config.json")
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    if dtype not in FLOAT_DTYPES.values():
        raise InputError(
            f"{folder} holds {dtype} weights; expected one of {', '.join(FLOAT_DTYPES)}: give it unquantized"
        )
    return dtype

"""What a server serves: finds the folders of the base model and its adapters, and checks that they fit together."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from alpaca.errors import InputError, MissingInput
from alpaca.files.model_folders import is_adapter
from alpaca.files.places import open_weights
from alpaca.files.reading import read_json
from alpaca.formats.hf.adapters import AdapterFolder, open_adapter
from alpaca.formats.hf.folder import find_fingerprint
from alpaca.formats.hf.merging import read_base_fingerprint, read_base_record
from alpaca.formats.hf.saved.unpacking import bitsandbytes_kind
from alpaca.serving.request import AdapterNames
from alpaca.serving.settings import DEFAULT_ADAPTER, ServerSettings, parse_adapters
from alpaca.text.chat.files import read_chat_template
from alpaca.text.chat.trained_prompt import read_trained_prompt
from alpaca.text.loading import load_tokenizer
from alpaca.text.prompts import format_prompt
from alpaca.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The folder of a base model, and its adapters by the names that requests use."""

    base: Path
    adapters: dict[str, AdapterFolder]


def adapter_names(adapters: Mapping[str, AdapterFolder]) -> AdapterNames:
    """The names of adapters that requests may ask for, the default, and their chat templates. Raises InputError."""
    found = {name: read_chat_template(adapter.path) for name, adapter in adapters.items()}
    prompts = {name: read_trained_prompt(adapter.path) for name, adapter in adapters.items()}
    return AdapterNames(
        named=tuple(adapters),
        default=DEFAULT_ADAPTER if DEFAULT_ADAPTER in adapters else None,
        templates={name: template for name, template in found.items() if template is not None},
        trained_prompts={name: prompt for name, prompt in prompts.items() if prompt is not None},
    )


def open_served_model(folder: Path, settings: ServerSettings) -> ServedModel:
    """Find the base model and the adapters of a server.

    `folder` is the base model's or an adapter's; the settings name further adapters, and the base of an adapter.
    Raises InputError, MissingInput.
    """
    adapters: dict[str, AdapterFolder] = {}
    base = folder
    if is_adapter(folder):
        adapters[DEFAULT_ADAPTER] = open_adapter(folder)
        base = _find_base(adapters[DEFAULT_ADAPTER], settings)
    elif settings.base_model:
        logger.warning("ALPACA_BASE_MODEL is not used: %s is no adapter but a whole model", folder)
    for name, place in parse_adapters(settings.adapters or "").items():
        found = open_weights(place, named=f"ALPACA_ADAPTERS: {name}")
        if not is_adapter(found):
            raise InputError(f"ALPACA_ADAPTERS: {name}={place} is no adapter: it has no adapter_config.json")
        adapters[name] = open_adapter(found)
    return ServedModel(base=base, adapters=adapters)


def obey_saved_quantization(base: Path, settings: ServerSettings) -> ServerSettings:
    """The settings with the quantization that the base's weights were saved in, if it is int8 or nf4.

    Weights of other methods are unpacked, and then quantized as the settings say. Raises InputError where bitsandbytes
    saved another quantization than the settings ask for.
    """
    saved = bitsandbytes_kind(read_json(base / "config.json")) if (base / "config.json").is_file() else "none"
    if saved in ("none", settings.quantization):
        return settings
    if settings.quantization != "none":
        raise InputError(
            f"{base} was saved as {saved} (by bitsandbytes), and ALPACA_QUANTIZATION asks for {settings.quantization}: "
            f"leave it out to serve what was saved; for {settings.quantization} give the model that it was made from"
        )
    if saved == "fp4":  # unpacked: there is no layer for it here
        return settings
    logger.info("%s was saved as %s, and is served so", base, saved)
    return dataclasses.replace(settings, quantization=saved)


def _find_base(adapter: AdapterFolder, settings: ServerSettings) -> Path:
    """The folder of an adapter's base model: the one the settings name, else the one its adapter_config.json names.

    A relative path of adapter_config.json is taken from the working directory.
    """
    if settings.base_model:
        base = open_weights(settings.base_model, named="ALPACA_BASE_MODEL")
    else:
        base = Path(adapter.base_name)
        if not adapter.base_name or not base.is_dir():
            looked = f"no folder {base.absolute()}" if adapter.base_name else "no base_model_name_or_path"
            raise MissingInput(
                f"{adapter.path} is an adapter, and its base model {adapter.base_name!r} is not here ({looked}). Set "
                "ALPACA_BASE_MODEL (--base_model) to the folder of that model, such as weights/llama-7b"
            )
    if is_adapter(base):
        raise InputError(f"{base} is an adapter itself; the base model of {adapter.path} must be a whole model")
    if not (base / "config.json").is_file():
        raise MissingInput(f"{base}, the base model of {adapter.path}, holds no config.json")
    return base


def check_tokenizers(adapters: Mapping[str, AdapterFolder], tokenizer: Tokenizer) -> None:
    """Check the tokenizers that adapters bring against the base model's, with which all of them are served.

    An additional [PAD] token makes no difference. Raises InputError if a tokenizer differs otherwise.
    """
    text = format_prompt("Name three alpacas.", "", "alpaca")
    for name, adapter in adapters.items():
        if not any((adapter.path / file).is_file() for file in _TOKENIZER_FILES):
            continue
        own = load_tokenizer(adapter.path)
        if own.base_size != tokenizer.base_size or own.encode(text) != tokenizer.encode(text):
            raise InputError(
                f"adapter {name}: the tokenizer in {adapter.path} ({own.base_size} tokens) is not the base model's "
                f"({tokenizer.base_size} tokens), and adapters add no rows to its embedding: this is another model's "
                "adapter, or another base is needed (ALPACA_BASE_MODEL)"
            )


def describe_other_bases(served: ServedModel, settings: ServerSettings) -> Iterator[str]:
    """Warnings about adapters whose base model is not the one they were trained on, which train.py recorded.

    Only warnings, since other tensors may be the same model in another dtype, and quantization may be intended.
    """
    own = None
    for name, adapter in served.adapters.items():
        quantization, _ = read_base_record(adapter.path)
        if quantization not in (None, settings.quantization):
            yield (
                f"adapter {name} was trained on its base with quantization {quantization}, and is served on one with "
                f"{settings.quantization}, which is another model: set ALPACA_QUANTIZATION={quantization} to serve "
                "what was trained"
            )
        trained_on = read_base_fingerprint(adapter.path)
        if trained_on:
            own = own or find_fingerprint(served.base)
        if trained_on and own and own != trained_on:
            yield (
                f"adapter {name} was trained on a base of other tensors (fingerprint {trained_on[:16]}) than "
                f"{served.base} ({own[:16]}): fine for the same model in another dtype; else set ALPACA_BASE_MODEL to "
                f"the folder of its own base, {adapter.base_name or 'which it does not name'}"
            )

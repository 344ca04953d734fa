"""Finds the weights that prediction and training use: a folder, an archive, or an archive's address."""

import os
from pathlib import Path

from alpaca.errors import InputError, MissingInput
from alpaca.files.archives import unpack, unpack_to
from alpaca.files.downloads import cache_folder, download, find_remote
from alpaca.files.locks import waiting_lock
from alpaca.files.model_folders import is_weights
from alpaca.files.names import is_valid_path, quote_name
from alpaca.files.network.addresses import is_address
from alpaca.files.reading import list_folder

TRAINED = Path("alpaca_out")
BASE_FOLDERS = (Path("weights"), TRAINED)


def open_weights(weights: str | None, *, named: str = "COG_WEIGHTS", lists: bool = True) -> Path:
    """Return the folder of the model or adapter to use: `weights` if given (COG_WEIGHTS), else train.py's output.

    weights: a folder, an archive (.tar, .tar.gz, .tgz, .zip), or the http(s) address of one. Archives are unpacked
    once, and downloaded once, into `cache_folder()`. named: the name of the setting, for errors. lists: whether an
    error lists the files of a folder without a model; a client need not know them. Raises MissingInput, which names the
    step that makes the folder, and InputError for an archive that is damaged or unsafe.
    """
    if weights and is_address(weights):
        return _fetch(weights)
    path = Path(weights) if weights else TRAINED
    if path.is_file():
        path = unpack(path)
    if not is_weights(path):
        found = f" (found: {list_folder(path)})" if lists else ""
        raise MissingInput(f"no model in {path}{found}. {_next_step(weights, named)}")
    return path


def choose_base(model: str, *, allowed: str, root: Path) -> str:
    """Return the folder, archive or address that a client's `model` stands for.

    Clients choose names, not paths: otherwise any client could have this machine read its files or fetch addresses.
    They may name files and folders in weights/ and alpaca_out/ below `root`, and those that the operator lists in
    `allowed` (ALPACA_BASE_MODELS): paths and addresses separated by commas, each as it is or as NAME=PATH. Raises
    InputError for any other.
    """
    names = dict(_parse_listed(entry.strip()) for entry in allowed.split(",") if entry.strip())
    if model in names:
        return names[model]
    if is_valid_path(model) and not is_address(model):
        place = Path(os.path.normpath(root / model))  # links are not followed: those in there are the operator's own
        if any(root / folder in place.parents for folder in BASE_FOLDERS):
            return str(place)
    known = ", ".join(name for name in names if _is_name(name)) or "none"
    raise InputError(
        f"model: expected a folder or archive in weights/ or alpaca_out/, or a name the operator listed in "
        f"ALPACA_BASE_MODELS (such names: {known}), found {quote_name(model)}. Clients may not choose other paths or "
        "addresses; the operator allows one by starting the server with ALPACA_BASE_MODELS=NAME=PATH_OR_ADDRESS"
    )


def _parse_listed(entry: str) -> tuple[str, str]:
    """The name that a client uses and the path it stands for: two parts of NAME=PATH, or one path that is both."""
    name, found, place = entry.partition("=")
    return (name, place) if found and _is_name(name) else (entry, entry)


def _is_name(text: str) -> bool:
    return bool(text) and "/" not in text


def _fetch(url: str) -> Path:
    """The folder of an archive at an address. The archive itself is deleted once it is unpacked."""
    remote = find_remote(url)
    with waiting_lock(cache_folder() / remote.name):
        target = cache_folder() / remote.name
        if remote.identity and is_weights(target):
            return target
        archive = download(remote, space_factor=2.0)  # itself, and what is in it
        try:
            target = cache_folder() / archive.name
            unpack_to(target, archive)
        finally:
            archive.unlink()
    return target


def _next_step(weights: str | None, named: str) -> str:
    if weights:
        return f"{named} must name a folder with config.json, safetensors and tokenizer, such as weights/llama-7b"
    return (
        "Fine-tune one first (python train.py --model_name_or_path weights/llama-7b --data_path … --output_dir "
        "alpaca_out), or set COG_WEIGHTS to a model folder such as weights/llama-7b"
    )

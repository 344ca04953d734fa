"""Finds the base model of an adapter that is to be merged."""

import logging
from dataclasses import dataclass
from pathlib import Path

from alpaca.errors import MissingInput
from alpaca.files.reading import list_folder
from alpaca.formats.hf.adapters import AdapterFolder

logger = logging.getLogger(__name__)

_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*", "tokenizer*", "*.txt"]


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """folder: of the model.    is_named: by the command's own flag.    note: for a log, where it was named."""

    folder: Path
    is_named: bool
    note: str


def find_base(
    adapter: AdapterFolder, *, flag: str, named: str | None = None, environment: str | None = None
) -> BaseModel:
    """The base that the command's `flag` names, else the environment's BASE_MODEL, else the adapter's own config.

    A name is a folder, from the working directory, or a repository on the Hugging Face hub. Raises MissingInput.
    """
    origins = {flag: named, "the environment's BASE_MODEL": environment, "the adapter": adapter.base_name}
    origin, name = next(((origin, name) for origin, name in origins.items() if name), ("", None))
    if not name:
        raise MissingInput(f"{adapter.path} does not say what its base model is: name its folder by {flag}")
    folder = _find_folder(name, origin, flag)
    note = f"{folder}, named by {origin}"
    if name != adapter.base_name and not (adapter.base_name and _is_same(folder, adapter.base_name)):
        note += f" (the adapter names {adapter.base_name or 'none'})"
    return BaseModel(folder=folder, is_named=origin == flag, note=note)


def _is_same(folder: Path, name: str) -> bool:
    return folder.resolve() == Path(name).resolve()


def _find_folder(name: str, origin: str, flag: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingInput(f"no config.json in {folder} (found: {list_folder(folder)}); expected a model's folder")
        return folder
    problem = f"no base model at {folder.absolute()}, which {origin} names: give its folder by {flag}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.parent.exists():
        raise MissingInput(problem)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # hub, network and cache errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingInput(f"{problem}. Nor could {name} be had from the Hugging Face hub: {reason}") from error

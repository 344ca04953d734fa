"""Weight folders of 2023: `pytorch_model.bin`, or `pytorch_model-00001-of-00003.bin` and so on with their index.

Opened memory-mapped and with `weights_only=True`: tensors cost no memory until they are read, and nothing in a file can
run. `open_model_weights` takes whichever kind a folder holds.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.inventory import untie
from alpaca.architecture.tensors import hf_name
from alpaca.errors import InputError, MissingInput
from alpaca.files.model_folders import is_adapter
from alpaca.files.reading import list_folder, read_json
from alpaca.formats.hf.folder import INDEX_NAME, TensorSpec, WeightsFolder

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = f"{PICKLE_NAME}.index.json"
_LFS_POINTER = b"version https://git-lfs"


class Weights(Protocol):
    """The methods that folders of safetensors and of pickled weights share."""

    path: Path

    @property
    def names(self) -> list[str]: ...

    def specs(self) -> list[TensorSpec]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


class PickledWeights:
    """The tensors of a folder with `pytorch_model*.bin`. Methods and errors are those of `WeightsFolder`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open_files: dict[str, dict[str, torch.Tensor]] = {}
        self._file_of = self._read_index()

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def specs(self) -> list[TensorSpec]:
        tensors = {name: self.tensor(name) for name in self._file_of}
        return [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._file_of:
            raise MissingInput(f"{self.path} holds no tensor {name!r}")
        file = self._file_of[name]
        if name not in self._open(file):
            raise InputError(f"{self.path / file} lacks {name!r}, which its index says it holds; get both again")
        return self._open(file)[name].detach()

    def _read_index(self) -> dict[str, str]:
        if not (self.path / PICKLE_INDEX_NAME).is_file():
            return dict.fromkeys(self._open(PICKLE_NAME), PICKLE_NAME)
        file_of = read_json(self.path / PICKLE_INDEX_NAME).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise InputError(f"{self.path / PICKLE_INDEX_NAME}: expected a weight_map of names and files; get it again")
        missing = sorted({file for file in file_of.values() if not (self.path / file).is_file()})
        if missing:
            raise MissingInput(f"{self.path / PICKLE_INDEX_NAME} names files not there: {', '.join(missing)}")
        return file_of

    def _open(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._open_files:
            self._open_files[file] = _load(self.path / file)
        return self._open_files[file]


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:  # torch before 1.6 wrote no zip files: those can only be read whole
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged, truncated or no PyTorch file; get it again: {reason}"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"{path} holds something else than a plain table of tensors; expected a model's weights")
    return dict(content)


def as_stored(description: ModelDescription, weights: Weights) -> ModelDescription:
    """The model as its folder holds it: a head that differs from the embedding is not tied, whatever config.json says.

    transformers has it so since version 5.
    """
    names = hf_name("embedding"), hf_name("head")
    shapes = {spec.name: spec.shape for spec in weights.specs()}
    return untie(description, shapes, has_equal_head=lambda: torch.equal(*map(weights.tensor, names)))


def open_model_weights(folder: str | Path) -> Weights:
    """A folder's weights, safetensors before pickles.

    Raises MissingInput for what is not there, InputError for damaged files, Git LFS pointers and LoRA adapters.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingInput(f"no folder {folder}; expected a Hugging Face model on this machine")
    if is_adapter(folder):
        raise InputError(f"{folder} is a LoRA adapter, no whole model: merge it first by convert.export_hf_checkpoint")
    _check_pointers(folder)
    if (folder / INDEX_NAME).is_file() or (folder / "model.safetensors").is_file():
        return WeightsFolder(folder)
    if (folder / PICKLE_INDEX_NAME).is_file() or (folder / PICKLE_NAME).is_file():
        return PickledWeights(folder)
    raise MissingInput(f"no model*.safetensors or pytorch_model*.bin in {folder}; found: {list_folder(folder)}")


def _check_pointers(folder: Path) -> None:
    """A `git clone` without git-lfs leaves a few lines of text under each large file's name."""
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")]):
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in {folder}")

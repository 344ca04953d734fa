"""Weight folders of 2023: `pytorch_model.bin`, or `pytorch_model-00001-of-00003.bin` and so on with their index.

Opened memory-mapped and with `weights_only=True`: tensors cost no memory until they are read, and nothing in a file can
run. `open_model_weights` takes whichever kind a folder holds.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.families import FAMILIES
from alpaca.architecture.inventory import is_tied, untie
from alpaca.architecture.tensors import hf_name
from alpaca.errors import InputError, MissingInput
from alpaca.files.model_folders import is_adapter
from alpaca.files.reading import list_folder, read_json_if_any
from alpaca.formats.hf.folder import (
    TensorSpec,
    WeightsFolder,
    has_safetensors,
    read_weight_map,
    warn_of_other_file,
)
from alpaca.formats.hf.naming import alias_tied_head, describe_renaming, find_names, find_value_head
from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight
from alpaca.formats.hf.saved.unpacking import Stored, UnpackedWeights
from alpaca.formats.torch_files import read_tensors

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = f"{PICKLE_NAME}.index.json"
logger = logging.getLogger(__name__)
_log_once = functools.cache(logger.info)
_LFS_POINTER = b"version https://git-lfs"


class Weights(Stored, Protocol):
    """The methods that folders of safetensors and of pickled weights share."""

    def stored(self, name: str) -> torch.Tensor | Int8Weight | Nf4Weight: ...

    def keeps(self, name: str) -> bool: ...


class RenamedWeights:
    """Weights of which some have other names than their file's, and some are left out.

    names: the new name of each old one.    without: old names of the tensors that are left out.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str], *, without: Collection[str] = ()) -> None:
        self.path, self._weights = weights.path, weights
        self._stored = {names.get(name, name): name for name in weights.names if name not in without}

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def specs(self) -> list[TensorSpec]:
        own = {name: new for new, name in self._stored.items()}
        specs = [spec for spec in self._weights.specs() if spec.name in own]
        return [dataclasses.replace(spec, name=own[spec.name]) for spec in specs]

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._stored:
            raise MissingInput(f"{self.path} holds no tensor {name!r}")
        return self._weights.tensor(self._stored[name])

    def stored(self, name: str) -> torch.Tensor | Int8Weight | Nf4Weight:
        """As `UnpackedWeights.stored`."""
        return self._weights.stored(self._stored[name])

    def keeps(self, name: str) -> bool:
        """As `UnpackedWeights.keeps`."""
        return self._weights.keeps(self._stored[name])


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
        return self._open(file)[name]

    def stored(self, name: str) -> torch.Tensor:
        """The same: nothing is quantized here."""
        return self.tensor(name)

    def keeps(self, name: str) -> bool:
        return False

    def _read_index(self) -> dict[str, str]:
        index = self.path / PICKLE_INDEX_NAME
        if (self.path / PICKLE_NAME).is_file():
            if index.is_file():
                warn_of_other_file(self.path, PICKLE_NAME, PICKLE_INDEX_NAME)
            return dict.fromkeys(self._open(PICKLE_NAME), PICKLE_NAME)
        return read_weight_map(index)

    def _open(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._open_files:
            self._open_files[file] = read_tensors(self.path / file, expected="PyTorch file", reads_whole=True)
        return self._open_files[file]


def as_stored(description: ModelDescription, weights: Weights) -> ModelDescription:
    """The model as its folder holds it: a head that differs from the embedding is not tied, whatever config.json says.

    transformers has it so since version 5.
    """
    names = hf_name("embedding"), hf_name("head")
    shapes = {spec.name: spec.shape for spec in weights.specs()}
    return untie(description, shapes, has_equal_head=lambda: torch.equal(*map(weights.tensor, names)))


def read_as_stored(folder: Path, description: ModelDescription) -> ModelDescription:
    """`as_stored` for a folder, where it holds weights; a config.json alone is taken at its word."""
    is_asked = description.ties_embeddings and (has_safetensors(folder) or has_pickles(folder))
    return as_stored(description, open_model_weights(folder)) if is_asked else description


def find_tied(weights: Weights) -> str | None:
    """The name of the embedding that is the head, too, in a model of any kind; None where the head is another matrix.

    The rule is `inventory.is_tied`; a file without a head has the embedding for it, whatever config.json says.
    """
    config, shapes = _read_config(weights.path), {spec.name: spec.shape for spec in weights.specs()}
    family, head = FAMILIES.get(str(config.get("model_type"))), hf_name("head")
    flag = config.get("tie_word_embeddings", family.ties_by_default if family else True)
    embedding = next((name for name in shapes if is_table(name) and name != head), None)
    if embedding is None:
        return None
    tied = is_tied(
        bool(flag) or head not in shapes,
        shapes,
        ends=(embedding, head),
        has_equal_head=lambda: torch.equal(weights.tensor(embedding), weights.tensor(head)),
    )
    return embedding if tied else None


def is_table(name: str) -> bool:
    """Whether a weight has a row for each token."""
    return name.rsplit(".", 2)[-2:][0] in ("embed_tokens", "word_embeddings", "lm_head")


def open_model_weights(folder: str | Path, *, dtype: torch.dtype | None = None) -> Weights:
    """A folder's weights as whole tensors under the model's own names, in the order that transformers looks for them.

    Names of wrappers are taken away (`naming`), and weights that were saved quantized are unpacked as they are read
    (`saved`), into `dtype`; None: the one that config.json names. Both are logged.
    Raises MissingInput for what is not there, InputError for damaged files, Git LFS pointers and LoRA adapters.
    """
    folder = Path(folder)
    weights, config = _open_stored(folder), _read_config(folder)
    names = find_names(weights.names, config, where=folder)
    if names:
        _log_once("%s: %s", folder, describe_renaming(names))
    value_head = find_value_head(weights.names)
    if value_head:
        _log_once(f"{folder}: {', '.join(value_head)} of TRL's value head are not read: no language model has them")
    weights = RenamedWeights(weights, names, without=value_head) if names or value_head else weights
    if config.get("quantization_config"):
        weights = UnpackedWeights(weights, config, dtype=dtype)
        _log_once("%s: %s", folder, weights.describe())
    if alias := alias_tied_head(weights.names, config):
        weights = RenamedWeights(weights, alias)
    return weights


def opens_as_stored(folder: str | Path) -> bool:
    """Whether a folder's tensors are whole and plainly named, so that transformers reads them by itself, too."""
    config = _read_config(Path(folder))
    stored = _open_stored(Path(folder)).names
    is_plain = not find_names(stored, config, where=Path(folder)) and not find_value_head(stored)
    return is_plain and not config.get("quantization_config")


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json_if_any(folder / "config.json")


def _open_stored(folder: Path) -> Weights:
    if not folder.is_dir():
        raise MissingInput(f"no folder {folder}; expected a Hugging Face model on this machine")
    if is_adapter(folder):
        raise InputError(f"{folder} is a LoRA adapter, no whole model: merge it first by convert.export_hf_checkpoint")
    _check_pointers(folder)
    if has_safetensors(folder):
        return WeightsFolder(folder)
    if has_pickles(folder):
        return PickledWeights(folder)
    raise MissingInput(f"no model*.safetensors or pytorch_model*.bin in {folder}; found: {list_folder(folder)}")


def has_pickles(folder: Path) -> bool:
    """Whether a folder holds `pytorch_model.bin`, or an index of several such files."""
    return (folder / PICKLE_NAME).is_file() or (folder / PICKLE_INDEX_NAME).is_file()


def _check_pointers(folder: Path) -> None:
    """A `git clone` without git-lfs leaves a few lines of text under each large file's name."""
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")]):
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in {folder}")

"""Hugging Face weight folders, read lazily: which tensors a folder holds, and one tensor at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes end to end (https://github.com/huggingface/safetensors).
"""

import functools
import hashlib
import json
import logging
import math
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.rope import describe_other_theta
from alpaca.errors import InputError, MissingInput, UnsupportedModel
from alpaca.files.reading import list_folder, read_json

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
logger = logging.getLogger(__name__)
_SAMPLE_BYTES = 4096  # of a tensor's either end, for its fingerprint
FILE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_warn_once = functools.cache(logger.warning)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """The entry of one tensor in a file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightsFolder:
    """The tensors of a folder with `model.safetensors`, or with several files and their index; read on demand.

    They are those that transformers reads: `model.safetensors` counts before an index beside it; an index only says
    which files count, and of a tensor that several of them hold, the last file's counts.
    Raises MissingInput when the folder, the index's files or the weights are missing, InputError for a damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open_files: dict[str, object] = {}
        self._specs: list[TensorSpec] | None = None
        self._file_of = self._read_index()

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    @property
    def file_of(self) -> dict[str, str]:
        """The file that holds each tensor, by the tensor's name."""
        return dict(self._file_of)

    def specs(self) -> list[TensorSpec]:
        """Every tensor's name, shape and dtype, from the headers alone, which are gone through once."""
        if self._specs is None:
            self._specs = [self._spec(name) for name in self._file_of]
        return self._specs

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read from its file now."""
        if name not in self._file_of:
            raise MissingInput(f"{self.path} holds no tensor {name!r}")
        return self._open(self._file_of[name]).get_tensor(name)

    def stored(self, name: str) -> torch.Tensor:
        """The same: nothing is unpacked here. `saved.unpacking.UnpackedWeights` has another meaning for it."""
        return self.tensor(name)

    def keeps(self, name: str) -> bool:
        """Whether `stored` gives a tensor as int8 or nf4."""
        return False

    def _spec(self, name: str) -> TensorSpec:
        file = self.path / self._file_of[name]
        part = self._open(self._file_of[name]).get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise InputError(f"{file}: {name!r} is {part.get_dtype()}; expected one of {', '.join(_DTYPES)}")
        return TensorSpec(name=name, shape=tuple(part.get_shape()), dtype=_DTYPES[part.get_dtype()])

    def _read_index(self) -> dict[str, str]:
        index = self.path / INDEX_NAME
        if (self.path / FILE_NAME).is_file():
            if index.is_file():
                warn_of_other_file(self.path, FILE_NAME, INDEX_NAME)
            return dict.fromkeys(self._open(FILE_NAME).keys(), FILE_NAME)
        if not index.is_file():
            raise MissingInput(f"no {FILE_NAME} or {INDEX_NAME} in {self.path}; found: {list_folder(self.path)}")
        listed = read_weight_map(index)
        file_of = {name: file for file in sorted(set(listed.values())) for name in [*self._open(file).keys()]}
        if lost := [name for name in listed if name not in file_of]:
            raise InputError(
                f"{self.path / listed[lost[0]]} lacks {lost[0]!r}, which its index says it holds; get both again"
            )
        return {name: file_of[name] for name in (*listed, *(name for name in file_of if name not in listed))}

    def _open(self, file: str):
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(self.path / file, framework="pt")
            except SafetensorError as error:
                raise InputError(f"{self.path / file} is damaged or not a safetensors file: {error}") from error
        return self._open_files[file]


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says it. Raises InputError, MissingInput."""
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise InputError(f"{index}: expected a weight_map of names and files; get it again")
    missing = sorted({file for file in file_of.values() if not (index.parent / file).is_file()})
    if missing:
        raise MissingInput(f"{index} names files that are not there: {', '.join(missing)}")
    return file_of


def warn_of_other_file(folder: Path, used: str, unused: str) -> None:
    """Log, once for a folder, which of two ways to say the weights counts: an older one may be another model."""
    _warn_once(f"{folder}: {used} is read, and {unused} beside it is not, as transformers has it")


def has_safetensors(folder: Path) -> bool:
    """Whether a folder's weights are safetensors: `model.safetensors`, or an index. Other files of the kind are no
    model's weights (an adapter's, say)."""
    return (folder / FILE_NAME).is_file() or (folder / INDEX_NAME).is_file()


def read_description(folder: str | Path, *, only: str | Sequence[str] = ()) -> ModelDescription:
    """What the folder's config.json says the model is.

    only: the model_types that the caller takes; of others the sizes are not even looked at. Raises MissingInput,
    UnsupportedModel, InputError.
    """
    file = Path(folder) / "config.json"
    kind = read_json(file).get("model_type")
    taken = [only] if isinstance(only, str) else [*only]
    if taken and kind not in taken:
        raise UnsupportedModel(f"{folder}: its model_type is {kind!r}, not {' or '.join(taken)}")
    config = read_json(file)
    description = ModelDescription.from_config(config, source=str(file))
    if note := describe_other_theta(config):
        _warn_once(f"{file}: {note}")
    return description


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of a model's tensors: names, shapes, dtypes and both ends of each one's bytes, however cut into files.

    Quick, for it reads a few KiB of each tensor: it tells one model from another, not a damaged file from a whole one.
    Raises MissingInput, InputError as WeightsFolder does.
    """
    weights = WeightsFolder(folder)
    file_of = weights.file_of
    starts = {file: _data_starts(weights.path / file) for file in sorted(set(file_of.values()))}
    digest = hashlib.sha256()
    for spec in sorted(weights.specs(), key=lambda spec: spec.name):
        entry = [spec.name, list(spec.shape), SAFETENSORS_NAMES[spec.dtype]]
        digest.update(json.dumps(entry).encode())
        file = file_of[spec.name]
        digest.update(_both_ends(weights.path / file, starts[file][spec.name], spec.num_bytes))
    return digest.hexdigest()


def find_fingerprint(folder: str | Path) -> str | None:
    """`fingerprint`, or None where the weights are no safetensors: those of pickles are not compared."""
    return fingerprint(folder) if has_safetensors(Path(folder)) else None


def _data_starts(path: Path) -> dict[str, int]:
    """Where each tensor's bytes start in a file that was opened before, so that its header is known to be right."""
    with open(path, "rb") as file:
        (num_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(num_bytes))
    return {name: 8 + num_bytes + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _both_ends(path: Path, start: int, num_bytes: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        first = file.read(min(num_bytes, _SAMPLE_BYTES))
        file.seek(start + max(0, num_bytes - _SAMPLE_BYTES))
        return first + file.read(min(num_bytes, _SAMPLE_BYTES))


def loading_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for a folder that it cannot load: a config of wrong types, missing or damaged files."""
    from huggingface_hub.errors import StrictDataclassError

    return OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError, StrictDataclassError


def require_all_weights(folder: Path, missing: Collection[str]) -> None:
    """Raise InputError when a loader found names `missing`, for which it would have gone on with random values."""
    if missing:
        raise InputError(f"{folder} lacks weights of its model: {', '.join(sorted(missing)[:5])}; copy it again")

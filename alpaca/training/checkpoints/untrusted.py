"""Reads torch's distributed checkpoints as data: nothing that a folder from somebody else holds is run.

torch keeps their index as a pickle, and reads it without restriction (2.11 and 2.13). Here it may name nothing but the
few classes an index is made of, which do no more than hold values.
"""

import io
import pickle
from collections.abc import Collection
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.planner import ReadItem

from alpaca.errors import InputError

_INDEX = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_INDEX, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a look into a table of names
}  # fmt: skip
_PATHS = (("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"))  # by the Python that wrote it; 3.13 has the second


class _IndexUnpickler(pickle._Unpickler):
    """In Python, since the C unpickler does not let anybody look at the states that objects are given."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return PosixPath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's index has")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Give an object its state: an object, never a class, which every later one would share."""
        built = type(self.stack[-2])
        if (built.__module__, built.__qualname__) not in _CLASSES:
            raise pickle.UnpicklingError(f"it gives a state to a {built.__qualname__}, as no checkpoint's index does")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class DataOnlyReader(FileSystemReader):
    """Reads a checkpoint's folder: its index by the restricted reader, and of its files only those that it should have.

    files: the names that the folder's trainer_state.json lists.
    """

    def __init__(self, folder: Path, files: Collection[str]) -> None:
        super().__init__(folder)
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises InputError for one that is none, or refers to other files."""
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
            paths = {info.relative_path for info in metadata.storage_data.values()}
        except Exception as error:  # whatever a file that is no index makes of the unpickler
            raise InputError(
                f"{path} is no index of a checkpoint: {error}. Was this folder made by train.py? Nothing in it was run"
            ) from error
        if others := sorted(map(str, paths - set(self._files))):
            raise InputError(f"{path} refers to files that are not the checkpoint's: {', '.join(others[:3])}")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class DataOnlyPlanner(DefaultLoadPlanner):
    """Takes a checkpoint's numbers and texts, too, with weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _saved(content))


def _saved(content: object) -> io.BytesIO:
    """`content` as torch.save writes it: the planner of torch reads its values from there, and puts them in place."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file

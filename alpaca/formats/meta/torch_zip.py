"""Writes a table of tensors as `torch.save` does, one tensor at a time, so that memory does not grow with the file.

The format is a zip archive without compression: `NAME/data.pkl` pickles the table with a reference in place of each
storage, `NAME/data/0` and so on are the storages' bytes (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch

from alpaca.formats.hf.folder import TensorSpec

_ALIGNMENT = 64  # bytes, as torch.save has it
_WRITE_BYTES = 16 << 20
_LOCAL_HEADER_BYTES, _ZIP64_BYTES, _PADDING_BYTES = 30, 20, 4  # of a zip entry, before its name, sizes and padding
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class TensorFileWriter:
    """Begins a file that `torch.load` reads as a table of `specs`; the tensors are then added in that order."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._specs = list(specs)
        self._next = 0
        self._prefix = path.stem
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._put("data.pkl", _pickled(self._specs))
        self._put("byteorder", b"little")

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._next == len(self._specs)
            self._put("version", b"3\n")
        self._zip.close()

    def write(self, tensor: torch.Tensor, progress: Callable[[int], object] = lambda num_bytes: None) -> None:
        """Add the next tensor's values, cast to its dtype. progress(n) is called after each n bytes written."""
        spec = self._specs[self._next]
        assert tuple(tensor.shape) == spec.shape, spec
        step = max(1, _WRITE_BYTES * len(tensor) // max(1, spec.num_bytes))
        with self._zip.open(self._entry(f"data/{self._next}"), "w", force_zip64=True) as file:
            for rows in tensor.split(step):
                data = rows.to(spec.dtype).contiguous().view(-1).view(torch.uint8).numpy()
                file.write(memoryview(data))
                progress(len(data))
        self._next += 1

    def _put(self, name: str, content: bytes) -> None:
        with self._zip.open(self._entry(name), "w", force_zip64=True) as file:
            file.write(content)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        """An entry whose data starts aligned, which padding in a field that readers skip brings about."""
        info = zipfile.ZipInfo(f"{self._prefix}/{name}")
        header = _LOCAL_HEADER_BYTES + len(info.filename) + _ZIP64_BYTES + _PADDING_BYTES
        padding = -(self._zip.fp.tell() + header) % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        return info


class _Tensor:
    """Stands for a tensor in the pickle."""

    def __init__(self, spec: TensorSpec, key: str) -> None:
        self.spec, self.key = spec, key

    def __reduce__(self) -> tuple[object, ...]:
        shape, strides = self.spec.shape, []
        for i in range(len(shape)):
            strides.append(torch.Size(shape[i + 1 :]).numel())
        values = (_Storage(self.spec, self.key), 0, tuple(shape), tuple(strides), False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, values


class _Storage:
    """Stands for a tensor's storage in the pickle, which refers to it by its key."""

    def __init__(self, spec: TensorSpec, key: str) -> None:
        self.reference = ("storage", _STORAGES[spec.dtype], key, "cpu", torch.Size(spec.shape).numel())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.reference if isinstance(value, _Storage) else None


def _pickled(specs: Sequence[TensorSpec]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump({spec.name: _Tensor(spec, str(key)) for key, spec in enumerate(specs)})
    return file.getvalue()

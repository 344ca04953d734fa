"""Hugging Face weight folders: read lazily, written as a stream, and never left half written.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes end to end (https://github.com/huggingface/safetensors). The header depends on names, dtypes and shapes
alone, so a file can be written one tensor at a time without ever holding two.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists

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
}
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WRITE_BYTES = 64 << 20
_SAMPLE_BYTES = 4096  # of a tensor's either end, for its fingerprint
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a file's header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# Reading ------------------------------------------------------------------------------------------------------


class WeightsFolder:
    """The tensors of a folder with `model.safetensors`, or with several files and their index; read on demand.

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

    def _spec(self, name: str) -> TensorSpec:
        file = self.path / self._file_of[name]
        try:
            part = self._open(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{file} lacks {name!r}, which its index says it holds; get both again") from error
        if part.get_dtype() not in _DTYPES:
            raise InputError(f"{file}: {name!r} is {part.get_dtype()}; expected one of {', '.join(_DTYPES)}")
        return TensorSpec(name=name, shape=tuple(part.get_shape()), dtype=_DTYPES[part.get_dtype()])

    def _read_index(self) -> dict[str, str]:
        index = self.path / INDEX_NAME
        if index.is_file():
            file_of = read_json(index).get("weight_map")
            if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
                raise InputError(f"{index}: expected a weight_map of names and files; get it again")
            missing = sorted({file for file in file_of.values() if not (self.path / file).is_file()})
            if missing:
                raise MissingInput(f"{index} names files that are not there: {', '.join(missing)}")
            return file_of
        if not (self.path / "model.safetensors").is_file():
            raise MissingInput(f"no model.safetensors or {INDEX_NAME} in {self.path}; found: {list_folder(self.path)}")
        return dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")

    def _open(self, file: str):
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(self.path / file, framework="pt")
            except SafetensorError as error:
                raise InputError(f"{self.path / file} is damaged or not a safetensors file: {error}") from error
        return self._open_files[file]


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
    has_any = any((Path(folder) / name).is_file() for name in (INDEX_NAME, "model.safetensors"))
    return fingerprint(folder) if has_any else None


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


def require_all_weights(folder: Path, missing: Collection[str]) -> None:
    """Raise InputError when a loader found names `missing`, for which it would have gone on with random values."""
    if missing:
        raise InputError(f"{folder} lacks weights of its model: {', '.join(sorted(missing)[:5])}; copy it again")


def read_json(path: str | Path) -> dict:
    """A JSON object. Raises MissingInput or InputError, naming the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInput(f"{path} is missing; found there: {list_folder(Path(path).parent)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def list_folder(path: Path, most: int = 12) -> str:
    """The names in a folder, for an error message."""
    if not path.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:most]) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# Writing ------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes of "5GB", "400MB", "300KB" (powers of ten, as Hugging Face reads them), "2GiB" or a plain number."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in units or float(match[1]) <= 0:
        raise InputError(f'expected a size such as "5GB" or "400MB", found {text!r}')
    return int(float(match[1]) * units[match[2].upper()])


def group_by_size(specs: Iterable[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Cut the tensors, in their order, into files of at most `max_shard_size` bytes (a larger tensor stands alone)."""
    groups: list[list[TensorSpec]] = []
    room = -1
    for spec in specs:
        if spec.num_bytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(spec)
        room -= spec.num_bytes
    return groups


def write_weights(
    folder: Path,
    specs: list[TensorSpec],
    read: Callable[[TensorSpec], Iterable[torch.Tensor]],
    *,
    max_shard_size: int,
    stem: str = "model",
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Stream tensors into `model*.safetensors` (and an index) in `folder`, each fsynced. `stem`: instead of "model".

    `read(spec)` is asked for one tensor at a time, in order, and gives it in pieces: its consecutive rows, or itself as
    the only one. `progress(n)` hears of each n bytes written.
    """
    groups = group_by_size(specs, max_shard_size)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update({spec.name: name for spec in group})
        with open(folder / name, "wb", buffering=0) as file:
            _write_all(file, _header(group))
            for spec in group:
                written = sum(_write_piece(file, piece, spec.dtype, progress) for piece in read(spec))
                assert written == spec.num_bytes, spec
            os.fsync(file.fileno())
    if len(groups) > 1:
        total = sum(spec.num_bytes for spec in specs)
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(specs: list[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as safetensors' own writer has it
    return struct.pack("<Q", len(text)) + text


def _write_piece(file, piece: torch.Tensor, dtype: torch.dtype, progress: Callable[[int], object]) -> int:
    """Write consecutive values of a tensor; the number of bytes."""
    assert piece.dtype == dtype
    data = memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy())
    for start in range(0, len(data), _WRITE_BYTES):
        _write_all(file, data[start : start + _WRITE_BYTES])
        progress(len(data[start : start + _WRITE_BYTES]))
    return len(data)


def _write_all(file, data) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file aside, fsync and rename it: a reader sees the old content or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")  # others may write it, too
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: object) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise NotEnoughSpace when the disk that will hold `folder` has less than `num_bytes` free."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise NotEnoughSpace(
            f"{folder} needs {num_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "free some space or choose another folder"
        )


def require_apart(output: Path, inputs: Mapping[str, Path | None]) -> None:
    """Raise InputError where replacing `output` would delete an input: it is one, a folder above one, or a file in one.

    inputs: by how the user knows them, "--input_dir" say. Links are followed, those in an input folder, too. A new
    output within an input folder is let be, and so is a GGUF file there, which no command reads.
    """
    target = output.resolve()
    for what, source in inputs.items():
        if source is None:
            continue
        places = [source, *_files_in(source)]
        found = next((place for place in places if _is_within(place, target)), None)
        if found is None and target.is_file() and target.suffix != ".gguf" and _is_within(target, source.resolve()):
            found = target
        if found is not None:
            raise InputError(
                f"the output {output} is, or holds, what is read from: {what} ({found}). Replacing it would delete "
                "that; choose another output"
            )


def _files_in(path: Path) -> list[Path]:
    """A folder's own files and links to files, but GGUF's."""
    entries = path.iterdir() if path.is_dir() else ()
    return [entry for entry in entries if not entry.is_dir() and entry.suffix != ".gguf"]


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, or what it is a link to, is `folder` or lies in it."""
    spelt = Path(os.path.normpath(path.absolute()))
    return any(folder in (place, *place.parents) for place in (path.resolve(), spelt, spelt.parent.resolve()))


@contextlib.contextmanager
def replaced_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill, beside `target`; it takes target's place when the block ends without an error.

    On an error it is removed and `target` stays as it was; what a killed run left is removed by the next. Raises
    OutputExists when `target` is there (not empty) without `overwrite`, or when another process is writing it now;
    InputError for a file where the folder, or one above it, should be.
    """
    target = Path(target)
    partial, aside = partial_folder(target), target.with_name(f".{target.name}.replaced")
    with locked(target):
        if aside.exists() and not target.exists():  # killed between the two renames below
            aside.rename(target)
        check_overwrite(target, overwrite)
        for leftover in (partial, aside):
            _remove(leftover)
        partial.mkdir()
        try:
            yield partial
            for entry in [*partial.rglob("*"), partial]:  # a rename must not outlive the data
                fsync(entry)
            if target.exists():
                target.rename(aside)
            partial.rename(target)
            fsync(target.parent)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise NotEnoughSpace(f"the disk ran full while {target} was written; nothing was changed") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if target.exists():
                _remove(aside)


def _remove(path: Path) -> None:
    """A folder, or a link to one, which is then only unlinked."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_overwrite(target: Path, overwrite: bool, *, is_folder: bool = True) -> None:
    """Raise OutputExists for a `target` that is there, unless it is an empty folder or `overwrite` is given.

    `is_folder`: what is to be written. Raises InputError for a target of the other kind, or below a file.
    """
    if target.exists() and target.is_dir() != is_folder:
        there, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise InputError(f"the output {target} is {there}, expected {wanted}'s name; choose another output")
    _require_no_file_above(target)
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise OutputExists(f"{target} exists already; pass --overwrite to replace it, or choose another output")


def _require_no_file_above(target: Path) -> None:
    file = next((parent for parent in target.absolute().parents if parent.exists()), None)
    if file and not file.is_dir():
        raise InputError(f"the output {target} would lie in {file}, which is a file; choose another output")


def partial_folder(target: Path) -> Path:
    """Where `replaced_folder` has its block write: for other processes that help to fill the folder."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing `target` meanwhile. Raises OutputExists when one does now, InputError."""
    _require_no_file_above(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputExists(f"another process is writing {target} now; wait for it to end") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Reads files of `torch.save` that hold a plain table of tensors: memory-mapped, and with nothing in them run."""

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from alpaca.errors import InputError

_PICKLE_START = b"\x80"  # followed by the protocol's number
_RESAVE = (
    'resave it where it came from, by a program that you trust: torch.save(torch.load(OLD, map_location="cpu", '
    "weights_only=False), NEW)"
)
_USUAL_TABLES = ("state_dict", "model_state_dict", "model", "module")  # where trainers put the model's own
_NUM_SHOWN, _NUM_KEY_CHARACTERS = 5, 80  # of a file's keys, in errors
_READ_PROTOCOL = 2  # the one torch.save uses unless told otherwise, and the only one that is read without running code


def read_tensors(path: Path, *, expected: str, reads_whole: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a file, detached from any gradient; memory-mapped where the file is a zip archive.

    expected: what the caller calls such a file.    reads_whole: whether to read a file of torch before 1.6, too; it is
    no archive, and needs memory for all of it at once.
    Raises InputError for a damaged file, one of another kind, and one that holds anything else, saying which.
    """
    is_archive = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what cannot be read says so itself
            content = torch.load(path, map_location="cpu", mmap=is_archive or not reads_whole, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, struct.error, pickle.UnpicklingError) as error:
        raise InputError(_explain(path, error, expected)) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(
            f"{path} holds something else than a plain table of tensors; expected {expected}, found "
            f"{_describe_content(content)}"
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def _describe_content(content: object) -> str:
    """What a file holds in place of a table of tensors, and the line of Python that makes one of it, where one does."""
    if not isinstance(content, Mapping):
        return _describe_value(content)
    named = [f"{_shorten(key)} ({_describe_value(value)})" for key, value in content.items()]
    others = [at for at, value in enumerate(content.values()) if not isinstance(value, torch.Tensor)]
    shown = [named[at] for at in others[:_NUM_SHOWN]]
    rest = f" and {len(others) - len(shown)} more" if len(others) > len(shown) else ""
    beside = f", beside {_count_tensors(content)} tensors" if len(others) < len(content) else ""
    return f"{', '.join(shown)}{rest}{beside}{_tell_unwrapping(content)}"


def _tell_unwrapping(content: Mapping[object, object]) -> str:
    loaded = 'torch.load(OLD, map_location="cpu", weights_only=True)'
    tables = [key for key, value in content.items() if isinstance(value, Mapping) and _count_tensors(value)]
    if _count_tensors(content):
        kept = f"{{name: value for name, value in {loaded}.items() if torch.is_tensor(value)}}"
        return f"; keep the tensors alone: torch.save({kept}, NEW)"
    if tables:
        inner = next((key for key in _USUAL_TABLES if key in tables), tables[0])
        return f"; unwrap the model's table: torch.save({loaded}[{_shorten(inner)}], NEW)"
    return ""


def _describe_value(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a table of {_count_tensors(value)} tensors"
    return "a tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _count_tensors(content: Mapping[object, object]) -> int:
    return sum(isinstance(value, torch.Tensor) for value in content.values())


def _shorten(key: object) -> str:
    return repr(key) if len(repr(key)) <= _NUM_KEY_CHARACTERS else f"{repr(key)[:_NUM_KEY_CHARACTERS]}…"


def _explain(path: Path, error: Exception, expected: str) -> str:
    protocol = _pickle_protocol(path)
    if protocol is not None and protocol > _READ_PROTOCOL:
        return (
            f"{path} was saved with pickle protocol {protocol}, which cannot be read without running what the file "
            f"says; expected protocol {_READ_PROTOCOL}: {_RESAVE}"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if protocol is not None and not zipfile.is_zipfile(path) and not isinstance(error, EOFError | struct.error):
        return (
            f"{path} is no zip archive but an older file (torch before 1.6 wrote such), which cannot be read here "
            f"piece by piece: {_RESAVE}"
        )
    return f"{path} ({path.stat().st_size:,} bytes) is damaged, truncated or no {expected}; get it again: {reason}"


def _pickle_protocol(path: Path) -> int | None:
    """The protocol of the file's pickle, within its archive or without one; None for what begins otherwise."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
                start = archive.open(name).read(2) if name else b""
        else:
            with open(path, "rb") as file:
                start = file.read(2)
    except (OSError, zipfile.BadZipFile):
        return None
    return start[1] if start[:1] == _PICKLE_START and len(start) == 2 else None

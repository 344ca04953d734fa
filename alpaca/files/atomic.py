"""Files and folders that a reader sees whole or not at all: written aside, fsynced, renamed."""

import contextlib
import errno
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from alpaca.errors import NotEnoughSpace, undisturbed
from alpaca.files.locks import locked
from alpaca.files.outputs import check_overwrite


def write_all(file: io.RawIOBase | BinaryIO, data: bytes | memoryview) -> None:
    """Write all of `data` to an unbuffered file, whose `write` may take only a part."""
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
        with undisturbed():
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, in the way of `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: object) -> None:
    """Write indented JSON, in the way of `write_bytes`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replaced_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give the block a new folder to fill, which takes the place of `target` when the block ends without an error.

    After an error the new folder is removed and `target` stays as it was; the remains of a killed run are removed by
    the next. Raises OutputExists when `target` exists and is not empty without `overwrite`, or when another process is
    writing it now; InputError for a file where the folder, or one above it, should be.
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
            with undisturbed():
                shutil.rmtree(partial, ignore_errors=True)
                if target.exists():
                    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link without its target."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def partial_folder(target: Path) -> Path:
    """The folder that `replaced_folder(target)` gives its block; other processes may help to fill it."""
    return target.with_name(f".{target.name}.partial")


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files and folders that a reader sees whole or not at all: written aside, fsynced, renamed."""

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from alpaca.errors import NotEnoughSpace
from alpaca.files.locks import locked
from alpaca.files.outputs import check_overwrite


def write_all(file, data) -> None:
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


def partial_folder(target: Path) -> Path:
    """Where `replaced_folder` has its block write: for other processes that help to fill the folder."""
    return target.with_name(f".{target.name}.partial")


def fsync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checks before an output is written: the disk has room, nothing is replaced unasked, and no input is overwritten."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from alpaca.errors import InputError, NotEnoughSpace, OutputExists


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
    """Raise InputError where replacing `output` would delete an input.

    That is so where the output is an input, a folder above one, or an existing file in an input folder. A new output
    within an input folder is allowed, and so is a GGUF file there, which no command reads. Links are followed, also
    those in an input folder. inputs: paths by the names that the user knows them by, such as "--input_dir".
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
    """The files directly in a folder, and links to files, except GGUF files."""
    entries = path.iterdir() if path.is_dir() else ()
    return [entry for entry in entries if not entry.is_dir() and entry.suffix != ".gguf"]


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, or the target of the link it is, is `folder` or lies in it."""
    spelt = Path(os.path.normpath(path.absolute()))
    return any(folder in (place, *place.parents) for place in (path.resolve(), spelt, spelt.parent.resolve()))


def check_overwrite(target: Path, overwrite: bool, *, is_folder: bool = True) -> None:
    """Raise OutputExists where `target` exists, unless it is an empty folder or `overwrite` is given.

    is_folder: whether a folder is to be written, or else a file. Raises InputError where `target` is of the other kind,
    or would lie below a file.
    """
    if target.exists() and target.is_dir() != is_folder:
        there, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise InputError(f"the output {target} is {there}, expected {wanted}'s name; choose another output")
    require_no_file_above(target)
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise OutputExists(f"{target} exists already; pass --overwrite to replace it, or choose another output")


def require_no_file_above(target: Path) -> None:
    """Raise InputError where a file stands in the place of one of the folders above `target`."""
    file = next((parent for parent in target.absolute().parents if parent.exists()), None)
    if file and not file.is_dir():
        raise InputError(f"the output {target} would lie in {file}, which is a file; choose another output")

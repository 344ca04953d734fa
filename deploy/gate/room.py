"""Whether there is room for what the runtime writes for a prediction.

It makes a folder for each, and writes a large input into it. Where that fails Cog's runtime (0.23.1) never gives back
the place that the prediction had, so that a prediction goes to it only where that cannot fail.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.gate.rules import Refused

_FOLDERS = Path("/tmp/coglet/predictions")
_SPARE_BYTES, _SPARE_FILES = 8 << 20, 256
_FILES_EACH = 4  # three folders, and the input
_BY_FILE_BYTES = 6 << 20  # a larger input goes to the worker by a file


@dataclass(frozen=True)
class Free:
    """What is free where the runtime makes its folders. files: None where the file system has no bound to them."""

    num_bytes: int
    files: int | None
    is_writable: bool


def free_room(folder: Path = _FOLDERS) -> Free:
    """Of the folder, or of the one above it in which it would be made."""
    while not folder.exists():
        folder = folder.parent
    system = os.statvfs(folder)
    return Free(
        num_bytes=system.f_bavail * system.f_frsize,
        files=system.f_favail if system.f_files else None,
        is_writable=os.access(folder, os.W_OK | os.X_OK),
    )


class Room:
    """What the predictions that run may need of it. concurrency: how many there may be."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._by_file = 0  # bytes of the inputs that go by files

    def problem(self, free: Free, size: int = 0) -> str | None:
        """Why no request of `size` bytes can be taken where so much is free; None where it can."""
        if not free.is_writable:
            return "the server may not write into its temporary folder"
        if free.num_bytes < _SPARE_BYTES + self._by_file + _by_file(size):
            return "the server's temporary folder has too little room"
        if free.files is not None and free.files < _SPARE_FILES + _FILES_EACH * self._concurrency:
            return "the server's temporary folder can hold too few further files"
        return None

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Room for a request of `size` bytes while the runtime takes it. Raises Refused where there is none."""
        if problem := self.problem(free_room(), size):
            raise Refused(503, f"{problem}; try again later")
        self._by_file += _by_file(size)
        try:
            yield
        finally:
            self._by_file -= _by_file(size)


def _by_file(size: int) -> int:
    return size if size > _BY_FILE_BYTES else 0

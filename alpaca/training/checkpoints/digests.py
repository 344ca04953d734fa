"""SHA-256 of checkpoint files: of what was to be written, compared with what the disk gives back.

A file is hashed while it is written, so the digest describes what was in memory. Afterwards the file is read from the
disk and hashed again. Each process does this for the files it wrote.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from torch.distributed.checkpoint.filesystem import FileSystem

_READ_BYTES = 8 << 20
_HASH_ASIDE_BYTES = 1 << 20  # smaller pieces are hashed at once: handing them to a thread takes longer


class FileDigest(TypedDict):
    """The size and digest of a file, as trainer_state.json records them."""

    bytes: int
    sha256: str


def digest_bytes(content: bytes) -> FileDigest:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def digest_json(content: object) -> str:
    """SHA-256 of a JSON value. It does not depend on how the file is indented or its keys are ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_damage(path: Path, expected: FileDigest, *, from_disk: bool = False) -> str:
    """Say in a sentence what is wrong with a file, or "" where nothing is.

    from_disk: have the kernel drop the file from its page cache first, so that the disk itself is read.
    """
    try:
        found = _digest_file(path, from_disk=from_disk)
    except FileNotFoundError:
        return f"{path}: expected {expected['bytes']} bytes, found no such file"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if found["bytes"] != expected["bytes"]:
        return f"{path}: expected {expected['bytes']} bytes, found {found['bytes']}"
    if found != expected:
        return f"{path}: expected SHA-256 {expected['sha256'][:16]}…, found {found['sha256'][:16]}…"
    return ""


def _digest_file(path: Path, *, from_disk: bool) -> FileDigest:
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            os.fsync(file.fileno())  # the kernel drops only what is on the disk already
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


class HashedFiles(FileSystem):
    """A file system for torch.distributed.checkpoint's writer that hashes each file on its way to the disk.

    digests: the files' digests by name.    error: the operating system's error, or None. The writer's own exceptions
    hide it (they call a full disk "unexpected pos").
    """

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}
        self.error: OSError | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        try:
            with super().create_stream(path, mode) as stream, ThreadPoolExecutor(1) as aside:
                hashed = _HashedStream(self, stream, aside)
                yield hashed
        except OSError as error:
            self.error = error
            raise
        self.digests[Path(path).name] = {"bytes": hashed.num_bytes, "sha256": hashed.digest.hexdigest()}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashedStream(io.RawIOBase):
    """A file opened for writing from start to end; it cannot seek."""

    def __init__(self, files: HashedFiles, stream: io.IOBase, aside: ThreadPoolExecutor) -> None:
        self._files, self._stream, self._aside = files, stream, aside
        self.digest, self.num_bytes = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        """Hash and write at the same time; both release Python's global lock."""
        view = memoryview(data).cast("B")
        hashing = self._aside.submit(self.digest.update, view) if len(view) > _HASH_ASIDE_BYTES else None
        try:
            self._stream.write(view)
        except OSError as error:
            self._files.error = error
            raise
        finally:
            hashing.result() if hashing else self.digest.update(view)
        self.num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.num_bytes

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()
        super().close()


def check_files(folder: Path, files: Mapping[str, FileDigest], *, from_disk: bool) -> str:
    """Say what is wrong with the first damaged file of a folder, or "" where none is."""
    return next(filter(None, (find_damage(folder / name, files[name], from_disk=from_disk) for name in files)), "")

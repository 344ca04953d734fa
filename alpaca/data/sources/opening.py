"""The bytes of a data file, unpacked where they are packed; what packs them is seen by their first bytes."""

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO

from alpaca.errors import InputError, MissingPackage

MOST_BYTES = 64 << 30  # of an unpacked file: a packed one of a few megabytes can hold any number of zeros
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 20


def read_bytes(path: Path, *, most_bytes: int = MOST_BYTES) -> bytes:
    """All bytes of a file, unpacked. Raises InputError where it cannot be read or holds more, MissingPackage."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            return _read(_unpacked(file, start, path), path, most_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged or only a part of a gzip file ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read as a file ({error.strerror or error})") from error


def _unpacked(file: BinaryIO, start: bytes, path: Path) -> BinaryIO:
    if start.startswith(_GZIP):
        return gzip.GzipFile(fileobj=file)
    if start == _ZSTD:
        return _open_zstd(file, path)
    return file


def _open_zstd(file: BinaryIO, path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackage(
            f"{path} is packed by zstd, and the package `zstandard` is needed to unpack it: pip install zstandard"
        ) from error
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def _read(file: BinaryIO, path: Path, most_bytes: int) -> bytes:
    found = io.BytesIO()
    try:
        while piece := file.read(_PIECE):
            found.write(piece)
            if found.tell() > most_bytes:
                raise InputError(f"{path} holds more than {most_bytes >> 20:,} MiB of data; train on a part of it")
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):  # its own class, of a package that may be missing
            raise InputError(f"{path} is damaged or only a part of a zstd file ({error}); copy it again") from error
        raise
    return found.getvalue()


def as_text(content: bytes, path: Path) -> str:
    """The text of a file's bytes. Raises InputError where it is none."""
    try:
        return content.decode("utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error

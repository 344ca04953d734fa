"""The bytes of a data file, unpacked where they are packed; what packs them is seen by their first bytes."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from alpaca.errors import InputError, MissingPackage

MOST_BYTES = 64 << 30  # of an unpacked file: a packed one of a few megabytes can hold any number of zeros
_ZSTD = b"\x28\xb5\x2f\xfd"
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_MOST_LAYERS = 3  # a file that was packed twice
_PIECE = 1 << 20
_ZSTD_PIECE = 1 << 12  # packed bytes given at once: they can become 128 MiB
_BYTE_ORDER_MARKS = {  # some editors and spreadsheets put one in front. UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_NO_DATA = {  # first bytes of files that are often given by mistake
    b"PK\x03\x04": "a zip archive, as Excel's .xlsx is one, too: unpack it, or save the table as CSV (UTF-8)",
    b"\x80\x04": "a pickle, and loading one runs code in it: save the records as JSON",
    b"FEA1": "Feather of version 1: save it as Parquet",
    b"version https://git-lfs": "only Git LFS's pointer to the data: `git lfs pull` fetches it",
    b"<!doctype html": "a web page and not data: download the file itself",
    b"<html": "a web page and not data: download the file itself",
}


def read_bytes(path: Path, *, most_bytes: int = MOST_BYTES) -> bytes:
    """All bytes of a file, unpacked. Raises InputError where it cannot be read or holds more, MissingPackage."""
    try:
        with open(path, "rb") as file:
            content = _read(file, path, most_bytes)
        for _ in range(_MOST_LAYERS - 1):
            if not _is_packed(content):
                break
            content = _read(io.BytesIO(content), path, most_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read as a file ({error.strerror or error})") from error
    return content


def _damaged(path: Path, error: Exception | str) -> InputError:
    return InputError(f"{path} is damaged or only a part of a packed file ({error}); copy it again")


def _is_packed(start: bytes) -> bool:
    return start.startswith((_ZSTD, *_OPENERS))


def _read(file: BinaryIO, path: Path, most_bytes: int) -> bytes:
    found = io.BytesIO()
    for piece in _pieces(file, path):
        found.write(piece)
        if found.tell() > most_bytes:
            raise InputError(f"{path} holds more than {most_bytes >> 20:,} MiB of data; train on a part of it")
    return found.getvalue()


def _pieces(file: BinaryIO, path: Path) -> Iterator[bytes]:
    start = file.read(8)
    file.seek(0)
    if start.startswith(_ZSTD):
        yield from _zstd_pieces(file, path)
        return
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
    source = file if opener is None else opener(file, "rb")
    while piece := source.read(_PIECE):
        yield piece


def _zstd_pieces(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """What the frames of a file hold. Its package's own readers take a part of a frame for the whole."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackage(
            f"{path} is packed by zstd, and the package `zstandard` is needed to unpack it: pip install zstandard"
        ) from error
    frame = None
    try:
        while packed := file.read(_ZSTD_PIECE):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise _damaged(path, error) from error
    if frame is not None:
        raise _damaged(path, "it ends inside a frame of zstd")


def as_text(content: bytes, path: Path) -> str:
    """The text of a file's bytes: UTF-8, or what a byte order mark says. Raises InputError where it is none."""
    lowered = content[:32].lstrip().lower()
    for magic, what in _NO_DATA.items():
        if lowered.startswith(magic.lower()):
            raise InputError(f"{path} is {what}")
    if content[257:262] == b"ustar":
        raise InputError(f"{path} is a tar archive: unpack it, and give the file of examples that is in it")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not {encoding.upper()} text ({error}); save it as UTF-8") from error
    if "\0" in text[:4]:
        raise InputError(f"{path} holds zero bytes, as UTF-16 text has without its mark; save it as UTF-8")
    return text

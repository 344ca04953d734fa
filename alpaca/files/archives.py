"""Archives of weights: packed, and unpacked safely.

An archive may come from anyone, so all of its entries are checked before the first one is written.
"""

import contextlib
import errno
import gzip
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from alpaca.errors import AlpacaError, InputError, MissingInput
from alpaca.files.atomic import replaced_folder
from alpaca.files.downloads import cache_folder
from alpaca.files.locks import waiting_lock
from alpaca.files.model_folders import MODEL_CONFIGS, MODEL_FILES, is_weights
from alpaca.files.names import is_valid_path, quote_name
from alpaca.files.outputs import require_free_space

_ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".zip")
# Limits on archives. Weights hardly compress, so an archive that unpacks to many times its size holds no model.
_MOST_FILES = 2_000
_MOST_GROWTH = 20
_ANY_GROWTH_BYTES = 100_000_000  # any archive may unpack to this much, however small it is
_PIECE_BYTES = 1 << 20  # the most that is read at once, of headers, too: hundreds may follow one another
_HEADERS_BYTES = 16 << 10  # of a file in a .tar beside its content: its header, that of a long name, padding
# Errors of tarfile, gzip and zipfile for damaged archives: besides their own classes they raise these.
_DAMAGES = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, ValueError,
    NotImplementedError, RecursionError, OverflowError, LookupError,
)  # fmt: skip


def pack(folder: Path, archive: Path) -> Path:
    """Write the model or adapter in `folder`, with its tokenizer, to a .tar that `open_weights` can open."""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    require_free_space(archive.parent, sum(file.stat().st_size for file in files))
    partial = archive.with_name(f".{archive.name}.partial")
    try:
        with tarfile.open(partial, "w") as tar:
            for file in files:
                tar.add(file, arcname=file.name)
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
    return archive


# Unpacking ------------------------------------------------------------------------------------------------------


def unpack(archive: Path) -> Path:
    """Unpack an archive into the cache, unless it was unpacked before; return the folder.

    Only plain files are accepted, all at the archive's top or all in one folder there. Raises InputError, before
    anything is written, for links, devices, paths that lead elsewhere, two files of one name, too many or too large
    files, and for a damaged archive; MissingInput for an archive without a model.
    """
    if not archive.name.endswith(_ARCHIVE_ENDINGS):
        raise InputError(f"{archive} is neither a folder nor an archive ({', '.join(_ARCHIVE_ENDINGS)})")
    state = archive.stat()
    target = cache_folder() / f"{archive.stem}-{state.st_size}-{state.st_mtime_ns}"
    with waiting_lock(target):
        if not is_weights(target):
            unpack_to(target, archive)
    return target


@dataclass(frozen=True, kw_only=True)
class _Member:
    """An entry of an archive; a folder's name ends in a slash. refused: its kind, if it is no plain file."""

    name: str
    num_bytes: int
    refused: str
    open: Callable[[], IO[bytes] | None]


def unpack_to(target: Path, archive: Path) -> None:
    try:
        with _open_members(archive) as members:
            taken = _check_members(members, archive)
            require_free_space(target, sum(member.num_bytes for member in taken))
            with replaced_folder(target, overwrite=True) as folder:
                for member in taken:
                    _extract(member, folder)
    except AlpacaError:
        raise
    except _DAMAGES as error:
        raise _damage(archive, error) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a .zip whose file would start before its first byte
            raise
        raise _damage(archive, error) from error


def _check_members(members: Iterator[_Member], archive: Path) -> list[_Member]:
    """The files to unpack. Raises at the first entry that is refused, and then reads no more of the archive."""
    most_bytes = _most_bytes(archive)
    taken: dict[str, _Member] = {}
    folders, total = set(), 0
    for number, member in enumerate(members, start=1):
        parts = PurePosixPath(member.name).parts
        if member.num_bytes < 0:  # a negative size would make room for others below the limit
            raise _refusal(archive, f"{quote_name(member.name)} of {member.num_bytes:,} bytes")
        total += member.num_bytes
        if number > _MOST_FILES or total > most_bytes:
            raise _refusal(
                archive, f"more than {_MOST_FILES:,} files or {most_bytes / 1e9:.1f} GB, {_MOST_GROWTH} times its size"
            )
        if _is_left_out(member.name):
            continue
        if member.refused or member.name.startswith("/") or ".." in parts or not 1 <= len(parts) <= 2:
            kind = f" ({member.refused})" if member.refused else ""
            raise _refusal(archive, f"{quote_name(member.name)}{kind}, which is no plain file of a model folder")
        if not is_valid_path(member.name):
            raise _refusal(archive, f"{quote_name(member.name)}, which cannot be a file's name")
        if parts[-1] in taken or folders - {parts[:-1]}:
            what = f"{quote_name(member.name)} beside files of the same name or of another folder; expected one"
            raise _refusal(archive, what)
        taken[parts[-1]] = member
        folders.add(parts[:-1])
    if not set(MODEL_CONFIGS) & taken.keys():
        found = ", ".join(sorted(taken)[:12]) or "nothing"
        raise MissingInput(f"no model in {archive}: expected {' or '.join(MODEL_CONFIGS)}, found {found}")
    return list(taken.values())


def _damage(archive: Path, error: Exception) -> InputError:
    what = str(error) or type(error).__name__
    if isinstance(error, RecursionError):
        what = "hundreds of headers in a row belong to one file"
    return InputError(f"{archive} is damaged or no archive: {what}")


def _most_bytes(archive: Path) -> int:
    return max(_ANY_GROWTH_BYTES, _MOST_GROWTH * archive.stat().st_size)


def _refusal(archive: Path, what: str) -> InputError:
    return InputError(f"{archive} holds {what}; nothing was unpacked")


def _extract(member: _Member, folder: Path) -> None:
    source = member.open()
    assert source is not None  # a plain file
    with source, open(folder / PurePosixPath(member.name).name, "wb") as target:
        shutil.copyfileobj(source, target, _PIECE_BYTES)


# Kinds of archives ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_members(archive: Path) -> Iterator[Iterator[_Member]]:
    """An archive's entries. Its kind is told by its first bytes, since an address need not end in .tar or .zip."""
    with open(archive, "rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        with zipfile.ZipFile(archive) as opened:
            yield (_zip_member(opened, info) for info in opened.infolist())
        return
    with (
        gzip.open(archive) if start.startswith(b"\x1f\x8b") else open(archive, "rb") as stream,
        tarfile.open(fileobj=_BoundedReads(stream, _most_bytes(archive)), mode="r:") as tar,
    ):
        yield (_tar_member(tar, info) for info in tar)


def _is_left_out(name: str) -> bool:
    """Whether an entry is skipped: folders, and the files that macOS adds."""
    last = PurePosixPath(name).name
    return name.endswith("/") or name.startswith("__MACOSX/") or last.startswith("._") or last == ".DS_Store"


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    refused = "" if info.isfile() else "a link or device"
    if info.issparse():
        refused = "a file with holes"
    name = info.name + "/" * info.isdir()
    return _Member(name=name, num_bytes=info.size, refused=refused, open=lambda: tar.extractfile(info))


def _zip_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)
    refused = "" if kind in (0, stat.S_IFREG) else "a link or device"
    if info.flag_bits & 0x41:  # a password, or a key
        refused = "encrypted"
    elif info.flag_bits & 0x20:
        refused = "a patch of another file"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        refused = "compressed otherwise than by deflate"
    return _Member(name=info.filename, num_bytes=info.file_size, refused=refused, open=lambda: opened.open(info))


class _BoundedReads:
    """A stream for tarfile, which by itself reads a header's long name into memory however long it claims to be.

    The stream also ends where the largest allowed archive would: a second header can make a file seem shorter than it
    is.
    """

    def __init__(self, stream: IO[bytes], most_bytes: int) -> None:
        self._stream, self._end = stream, most_bytes + _MOST_FILES * _HEADERS_BYTES
        self.tell, self.close = stream.tell, stream.close

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and not 0 <= position <= self._end:
            raise tarfile.ReadError(f"a file that ends at byte {position:,}")
        return self._stream.seek(position, whence)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _PIECE_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)

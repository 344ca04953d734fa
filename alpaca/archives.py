"""Weights as a folder, an archive or an address of one: found, packed, and opened safely, for prediction and training.

An archive may come from anywhere: what it holds is checked before anything of it is written.
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

from alpaca.adapters import is_adapter
from alpaca.downloads import cache_folder, download, find_remote, is_address, waiting_lock
from alpaca.errors import AlpacaError, InputError, MissingInput
from alpaca.hf_files import list_folder, replaced_folder, require_free_space

TRAINED = Path("alpaca_out")
BASE_FOLDERS = (Path("weights"), TRAINED)
_ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".zip")
# What serving needs of a training's output, a model's or an adapter's: no checkpoints, logs or plots.
_MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "tokenizer.tiktoken", "*.jinja", "*.txt", "loss.png")
_MODEL_CONFIGS = ("config.json", "adapter_config.json")
# Limits on archives. Weights hardly compress, so what unpacks to much more than it was is no model.
_MOST_FILES = 2_000
_MOST_GROWTH = 20
_ANY_GROWTH_BYTES = 100_000_000  # what any archive may come to, however small
_PIECE_BYTES = 1 << 20  # the most that is read at once; of headers, too, which may follow one another by hundreds
_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 3_000  # Linux takes 4,096 of a path, which includes the folder's own
_HEADERS_BYTES = 16 << 10  # of a file in a .tar, beside what it holds: its own, a long name's, padding
_SHOWN_CHARACTERS = 80
# What tarfile, gzip and zipfile raise for bytes they did not expect, over and above their own errors.
_DAMAGES = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, ValueError,
    NotImplementedError, RecursionError, OverflowError, LookupError,
)  # fmt: skip


def open_weights(weights: str | None, *, named: str = "COG_WEIGHTS", lists: bool = True) -> Path:
    """The folder of the model or adapter to use: `weights` when given (COG_WEIGHTS), else what train.py left.

    weights: a folder, an archive (.tar, .tar.gz, .tgz, .zip), or the http(s) address of one. Archives are unpacked
    once, and downloaded once, into `cache_folder()`. `named` is what the caller calls it in errors; these tell what a
    folder without a model holds, unless `lists` is false: a client need not know. Raises MissingInput naming the step
    that makes the folder, InputError for what is no folder or archive, or an archive that is damaged or unsafe.
    """
    if weights and is_address(weights):
        return _fetch(weights)
    path = Path(weights) if weights else TRAINED
    if path.is_file():
        path = unpack(path)
    if not is_weights(path):
        found = f" (found: {list_folder(path)})" if lists else ""
        raise MissingInput(f"no model in {path}{found}. {_next_step(weights, named)}")
    return path


def is_weights(folder: Path) -> bool:
    """Whether a folder has a model's config or an adapter's."""
    return (folder / "config.json").is_file() or is_adapter(folder)


def pack(folder: Path, archive: Path) -> Path:
    """Write the model or adapter in `folder`, its tokenizer with it, as a .tar that `open_weights` takes."""
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
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


def choose_base(model: str, *, allowed: str, root: Path) -> str:
    """The folder, archive or address that a client's `model` stands for.

    Clients choose names, not paths: else any of them could have files of this machine read, or addresses fetched, in
    its name. They may name what lies in weights/ and alpaca_out/ below `root`, and what the operator lists in `allowed`
    (ALPACA_BASE_MODELS), separated by commas: paths and addresses, as they are or as NAME=PATH. Raises InputError.
    """
    names = dict(_parse_listed(entry.strip()) for entry in allowed.split(",") if entry.strip())
    if model in names:
        return names[model]
    if _is_path(model) and not is_address(model):
        place = Path(os.path.normpath(root / model))  # by the letters: links in there are the operator's own
        if any(root / folder in place.parents for folder in BASE_FOLDERS):
            return str(place)
    known = ", ".join(name for name in names if _is_name(name)) or "none"
    raise InputError(
        f"model: expected a folder or archive in weights/ or alpaca_out/, or a name the operator listed in "
        f"ALPACA_BASE_MODELS (such names: {known}), found {_shown(model)}. Clients may not choose other paths or "
        "addresses; the operator allows one by starting the server with ALPACA_BASE_MODELS=NAME=PATH_OR_ADDRESS"
    )


def _parse_listed(entry: str) -> tuple[str, str]:
    """The name a client uses, and what it stands for: of NAME=PATH, or of a path that is its own name."""
    name, found, place = entry.partition("=")
    return (name, place) if found and _is_name(name) else (entry, entry)


def _is_name(text: str) -> bool:
    return bool(text) and "/" not in text


def _is_path(text: str) -> bool:
    """Whether a file may have this path. No file of ours has control characters or lone surrogates in its name."""
    if not text.isprintable():
        return False
    parts = [part.encode() for part in text.split("/")]
    return sum(map(len, parts)) <= _MOST_PATH_BYTES and max(map(len, parts)) <= _MOST_NAME_BYTES


def _shown(name: str) -> str:
    cut = f"… of {len(name):,} characters" if len(name) > _SHOWN_CHARACTERS else ""
    return f"{name[:_SHOWN_CHARACTERS]!r}{cut}"


# Unpacking ------------------------------------------------------------------------------------------------------


def unpack(archive: Path) -> Path:
    """The folder an archive's files are unpacked to; the same archive is unpacked once.

    Only plain files are taken, all at the archive's top or all in one folder there. Raises InputError, before anything
    is written, for links, devices, paths that lead elsewhere, files of one name, too much of it all, and for a damaged
    archive; MissingInput for one without a model.
    """
    if not archive.name.endswith(_ARCHIVE_ENDINGS):
        raise InputError(f"{archive} is neither a folder nor an archive ({', '.join(_ARCHIVE_ENDINGS)})")
    state = archive.stat()
    target = cache_folder() / f"{archive.stem}-{state.st_size}-{state.st_mtime_ns}"
    with waiting_lock(target):
        if not is_weights(target):
            _unpack_to(target, archive)
    return target


def _fetch(url: str) -> Path:
    """The folder of an archive at an address. The archive itself is deleted once it is unpacked."""
    remote = find_remote(url)
    with waiting_lock(cache_folder() / remote.name):
        target = cache_folder() / remote.name
        if remote.identity and is_weights(target):
            return target
        archive = download(remote, space_factor=2.0)  # itself, and what is in it
        try:
            target = cache_folder() / archive.name
            _unpack_to(target, archive)
        finally:
            archive.unlink()
    return target


@dataclass(frozen=True, kw_only=True)
class _Member:
    """An entry of an archive; a folder's name ends in a slash. refused: what it is, where it is no plain file."""

    name: str
    num_bytes: int
    refused: str
    open: Callable[[], IO[bytes] | None]


def _unpack_to(target: Path, archive: Path) -> None:
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
    """The files to unpack. Raises at the first that may not be: nothing more of the archive is read then."""
    most_bytes = _most_bytes(archive)
    taken: dict[str, _Member] = {}
    folders, total = set(), 0
    for number, member in enumerate(members, start=1):
        parts = PurePosixPath(member.name).parts
        if member.num_bytes < 0:  # would make room for others
            raise _refusal(archive, f"{_shown(member.name)} of {member.num_bytes:,} bytes")
        total += member.num_bytes
        if number > _MOST_FILES or total > most_bytes:
            raise _refusal(
                archive, f"more than {_MOST_FILES:,} files or {most_bytes / 1e9:.1f} GB, {_MOST_GROWTH} times its size"
            )
        if _is_left_out(member.name):
            continue
        if member.refused or member.name.startswith("/") or ".." in parts or not 1 <= len(parts) <= 2:
            kind = f" ({member.refused})" if member.refused else ""
            raise _refusal(archive, f"{_shown(member.name)}{kind}, which is no plain file of a model folder")
        if not _is_path(member.name):
            raise _refusal(archive, f"{_shown(member.name)}, which cannot be a file's name")
        if parts[-1] in taken or folders - {parts[:-1]}:
            what = f"{_shown(member.name)} beside files of the same name or of another folder; expected one"
            raise _refusal(archive, what)
        taken[parts[-1]] = member
        folders.add(parts[:-1])
    if not set(_MODEL_CONFIGS) & taken.keys():
        found = ", ".join(sorted(taken)[:12]) or "nothing"
        raise MissingInput(f"no model in {archive}: expected {' or '.join(_MODEL_CONFIGS)}, found {found}")
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
    """An archive's entries. Its kind is read from its first bytes, since addresses need not end in it."""
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
    """Folders, and what macOS adds."""
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
    """A stream for tarfile, which reads a header's long name into memory however long it claims to be.

    Nor may it go past what an archive may come to: by a second header's word a file can seem shorter than it is.
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


def _next_step(weights: str | None, named: str) -> str:
    if weights:
        return f"{named} must name a folder with config.json, safetensors and tokenizer, such as weights/llama-7b"
    return (
        "Fine-tune one first (python train.py --model_name_or_path weights/llama-7b --data_path … --output_dir "
        "alpaca_out), or set COG_WEIGHTS to a model folder such as weights/llama-7b"
    )

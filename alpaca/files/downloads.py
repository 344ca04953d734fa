"""Files at http and https addresses, downloaded into a cache: resumed after an interruption, checked, never twice.

Rules of resuming: RFC 9110, sections 13.1.5 (If-Range) and 14 (range requests).
"""

import errno
import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from tqdm import tqdm

from alpaca.errors import InputError, NotEnoughSpace
from alpaca.files.atomic import fsync, write_all, write_json
from alpaca.files.locks import waiting_lock
from alpaca.files.network.addresses import Address, parse_address
from alpaca.files.network.requests import RangeRefused, iterate_pieces, open_reply, read_length, read_range
from alpaca.files.network.retries import InterruptedTry, retry
from alpaca.files.outputs import require_free_space
from alpaca.files.progress import progress_bar

logger = logging.getLogger(__name__)
_KEPT_FREE_BYTES = 1 << 30  # by a download that does not say how long it is
_LOOK_BYTES = 64 << 20  # between two looks at what is free
_PROGRESS_BYTES = 1 << 20  # a try that brought less than this counts as a failure in a row


def cache_folder() -> Path:
    """Where downloads and unpacked archives are kept: ALPACA_CACHE, else alpaca-weights in the temporary folder.

    Raises InputError where the latter is another user's: anyone may make a folder there, and fill it.
    """
    asked = os.environ.get("ALPACA_CACHE")
    folder = Path(asked) if asked else Path(tempfile.gettempdir()) / "alpaca-weights"
    folder.mkdir(mode=0o755 if asked else 0o700, parents=True, exist_ok=True)
    if not asked and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise InputError(f"{folder} is a link or another user's; name a folder of your own with ALPACA_CACHE")
    return folder


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file at an address.

    identity: a short text that changes with the file's content; None where the server says nothing to tell by.
    """

    address: Address
    identity: str | None

    @property
    def name(self) -> str:
        """The name of the file, or of the folder unpacked from it, in the cache."""
        return f"{self.address.label}-{self.identity or _key(self.address) + '-unversioned'}"


def find_remote(text: str) -> Remote:
    """Find out which file is at an address now; its server is not asked where the address has the file's digest.

    Raises InputError for a wrong address, MissingInput where the server cannot be reached or has no such file.
    """
    address = parse_address(text)
    if address.sha256:
        return Remote(address=address, identity=address.sha256[:32])

    def ask() -> Remote:
        try:
            # One byte by GET, not HEAD: addresses are signed for one method.
            with open_reply(address, {"Range": "bytes=0-0"}) as reply:
                return Remote(address=address, identity=_State.of(reply).identity(address))
        except RangeRefused:  # an empty file
            return Remote(address=address, identity=None)

    return retry(ask, what=f"{address} could not be reached", left="Nothing was downloaded yet")


def _key(address: Address) -> str:
    return hashlib.sha256(address.url.encode()).hexdigest()[:16]


# Downloading ----------------------------------------------------------------------------------------------------


def download(source: str | Remote, *, space_factor: float = 1.0) -> Path:
    """Download a file into the cache, unless it is there already, under a name that changes with the file's content.

    A download that broke or was killed is resumed if the server still has that very file, and else begun again.
    Processes that want the same file wait for each other. space_factor: the disk must have room for this many times
    the file's size. Raises InputError for a wrong address or digest, MissingInput for a file that
    cannot be had, NotEnoughSpace.
    """
    remote = source if isinstance(source, Remote) else find_remote(source)
    address, folder = remote.address, cache_folder() / "downloads"
    folder.mkdir(exist_ok=True)
    partial = folder / f".{_key(address)}.partial"
    with waiting_lock(partial):
        target = folder / remote.name
        if remote.identity and target.is_file():
            return target
        state = _fetch_whole(address, partial, space_factor=space_factor)
        _check_digest(address, partial)
        fsync(partial)
        identity = remote.identity if address.sha256 else state.identity(address)
        target = folder / Remote(address=address, identity=identity).name
        partial.replace(target)
        _state_file(partial).unlink(missing_ok=True)
    return target


@dataclass(frozen=True, kw_only=True)
class _State:
    """Which of the server's files a partial file belongs to.

    validator: the value for If-Range, a strong ETag or a date; "" where the server sent neither, so that nothing can be
    resumed.    version: ETag or date, weak ETags too: enough to tell files apart, not enough to join their parts.
    size: of the whole file in bytes.
    """

    validator: str
    version: str
    size: int | None

    @classmethod
    def of(cls, reply: httpx.Response) -> "_State":
        etag, date = reply.headers.get("ETag", ""), reply.headers.get("Last-Modified", "")
        strong = etag if etag.startswith('"') else ""
        size = read_range(reply)[1] if reply.status_code == 206 else read_length(reply)
        return cls(validator=strong or date, version=etag or date, size=size)

    def identity(self, address: Address) -> str | None:
        if not self.version:
            return None
        return hashlib.sha256(f"{address.url}\n{self.version}\n{self.size}".encode()).hexdigest()[:16]


def _state_file(partial: Path) -> Path:
    return partial.with_suffix(".json")


def _read_state(partial: Path) -> _State | None:
    """The state of the partial file on disk; None where there is no such file or it cannot be resumed."""
    try:
        state = _State(**json.loads(_state_file(partial).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return state if state.validator and partial.is_file() and partial.stat().st_size else None


def _fetch_whole(address: Address, partial: Path, *, space_factor: float) -> _State:
    """Fill `partial`, in as many tries as it takes as long as they bring something. Raises MissingInput."""
    most_bytes = 0
    with progress_bar(f"download {address.label}") as bar:

        def has_progressed() -> bool:
            nonlocal most_bytes
            progressed = bar.n >= most_bytes + _PROGRESS_BYTES
            most_bytes = max(most_bytes, bar.n)
            return progressed

        return retry(
            lambda: _fetch(address, partial, bar, space_factor=space_factor),
            what=f"{address} could not be downloaded",
            left="Whatever the download brought is kept, and the next start goes on from there",
            has_progressed=has_progressed,
        )


def _fetch(address: Address, partial: Path, bar: tqdm, *, space_factor: float) -> _State:
    """One try: go on with `partial` or begin it. Raises InterruptedTry."""
    state = _read_state(partial)
    have = partial.stat().st_size if state else 0
    headers = {"Range": f"bytes={have}-", "If-Range": state.validator} if state else {}
    try:
        with open_reply(address, headers) as reply:
            return _store(address, reply, partial, bar, state=state, space_factor=space_factor)
    except RangeRefused as refused:
        if state and refused.size == have == state.size:  # killed between the last byte and the file's new name
            return state
        partial.unlink(missing_ok=True)
        raise InterruptedTry("the server has another file now") from None


def _store(
    address: Address, reply: httpx.Response, partial: Path, bar: tqdm, *, state: _State | None, space_factor: float
) -> _State:
    """Add a reply to the partial file that `state` describes, or begin a new one. Raises InterruptedTry."""
    have = partial.stat().st_size if state else 0
    is_part = reply.status_code == 206
    if is_part and state and (read_range(reply)[0], _State.of(reply)) != (have, state):
        partial.unlink()
        raise InterruptedTry("the server sent a part of another file than was asked for")
    if not is_part or not state:
        state, have = _begin(address, reply, partial), 0
    require_free_space(partial, int((state.size or 0) * space_factor) - have)
    bar.total, bar.n, bar.initial = state.size, have, have
    bar.refresh()
    try:
        _receive(reply, partial, bar, kept_free=_KEPT_FREE_BYTES if state.size is None else 0)
    except NotEnoughSpace:
        if state.size is None:  # it may have no end
            partial.unlink(missing_ok=True)
        raise
    if state.size is not None and bar.n != state.size:
        raise InterruptedTry(f"the connection ended after {bar.n:,} of {state.size:,} bytes")
    return state


def _begin(address: Address, reply: httpx.Response, partial: Path) -> _State:
    """Start from the first byte: write an empty partial file, and the state beside it."""
    state = _State.of(reply)
    size = "of unknown size" if state.size is None else f"{state.size / 1e6:,.1f} MB"
    again = "begun again, the server cannot resume it or has another file now" if partial.is_file() else size
    logger.info("downloading %s: %s", address, again)
    partial.write_bytes(b"")
    write_json(_state_file(partial), {"validator": state.validator, "version": state.version, "size": state.size})
    return state


def _receive(reply: httpx.Response, partial: Path, bar: tqdm, *, kept_free: int) -> None:
    """Append a reply's content to `partial`, so that the disk keeps that many bytes free.

    Raises InterruptedTry, NotEnoughSpace.
    """
    looked_at = 0
    with open(partial, "ab", buffering=0) as file:
        for piece in iterate_pieces(reply):
            if kept_free and bar.n >= looked_at:
                require_free_space(partial, kept_free)
                looked_at = bar.n + _LOOK_BYTES
            try:
                write_all(file, piece)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise NotEnoughSpace(f"the disk ran full while {partial} was written; ALPACA_CACHE moves it") from error
            bar.update(len(piece))


def _check_digest(address: Address, file: Path) -> None:
    """Raise InputError, and remove the file, unless it has the digest its address asks for."""
    if not address.sha256:
        return
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        while piece := source.read(16 << 20):
            digest.update(piece)
    if digest.hexdigest() != address.sha256:
        file.unlink()
        raise InputError(
            f"{address} is not the file it should be: expected sha256 {address.sha256}, found {digest.hexdigest()}; "
            "it was removed. Check the digest, or fetch the file from where it was published"
        )

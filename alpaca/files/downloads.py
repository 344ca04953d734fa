"""Files at http and https addresses: fetched into a cache with progress, resumed after an interruption, checked; sent.

An address may end in `#sha256=…`, the digest its file must have. Passwords and signed tokens are parts of addresses,
so logs and errors show scheme, host and path alone. The rules of resuming are HTTP's (RFC 9110, 13.1.5 and 14).
"""

import base64
import dataclasses
import errno
import hashlib
import http.client
import ipaddress
import json
import logging
import os
import re
import ssl
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from alpaca.errors import InputError, MissingInput, NotEnoughSpace
from alpaca.files.atomic import fsync, write_json
from alpaca.files.locks import waiting_lock
from alpaca.files.outputs import require_free_space

logger = logging.getLogger(__name__)
_TIMEOUT_S = 30.0  # to connect, and between two pieces
_STORING_S = 600.0  # for an upload's answer: some servers store or copy all of it first
_MOST_FAILURES = 6  # in a row that brought next to nothing
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 20.0
_PIECE_BYTES = 1 << 20  # a try that brought less than this counts as a failure in a row
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # states of a server that may be over soon
_SCHEMES = ("http", "https")
_HOST = re.compile(r"(?=.{1,254}\Z)([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?")


def is_address(text: str) -> bool:
    """Whether `text` is meant as an address, of any scheme, rather than a path."""
    return "://" in text


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


# Addresses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Address:
    """An address taken apart. url: without fragment and password.    authorization: the header these make."""

    url: str
    authorization: str | None
    sha256: str | None

    def __str__(self) -> str:
        """What may be shown."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    __repr__ = __str__

    @property
    def label(self) -> str:
        """The file's name, as far as it is one."""
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.url).path.rpartition("/")[2])
        return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-60:].strip(".") or "file"


def parse_address(text: str) -> Address:
    """Take an address apart. Raises InputError for another scheme, no valid host, or a fragment that is no digest."""
    parts = _split(text.strip())
    digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
    if parts.fragment and not digest:
        raise InputError(f"after # in an address: expected sha256= and 64 hexadecimal digits, found {parts.fragment!r}")
    user, _, host = parts.netloc.rpartition("@")
    authorization = None
    if user:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        authorization = f"Basic {encoded}"
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    url = urllib.parse.urlunsplit((parts.scheme.lower(), host, path, query, ""))
    return Address(url=url, authorization=authorization, sha256=digest[1].lower() if digest else None)


def _split(text: str) -> urllib.parse.SplitResult:
    """An address's parts, its host and port such as can be asked. Raises InputError, which shows no part of them.

    What is wrong may come of a password: one with a slash in it ends the host too early.
    """
    scheme = text.partition(":")[0]
    if scheme.lower() not in _SCHEMES:
        raise InputError(f"expected an http or https address, found the scheme {scheme[:20]!r} and no more is shown")
    try:
        text.encode()
        parts = urllib.parse.urlsplit(text)
        host, wrong = parts.hostname or "", parts.port == 0
    except ValueError:  # brackets, a port that is none, lone surrogates: its words quote the address
        host, wrong = "", True
    if wrong or not _is_host(host):
        raise InputError(
            "expected an http or https address with a host such as example.com, 10.0.0.5:8000 or [::1], found none "
            "that is valid (the address is not shown: it may hold a password). International names are written as "
            "xn--…; in a password / is %2F, @ is %40, # is %23 and ? is %3F"
        )
    return parts


def _is_host(text: str) -> bool:
    if ":" not in text:
        return bool(_HOST.fullmatch(text))
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file at an address. identity: changes with its content; None where the server does not say."""

    address: Address
    identity: str | None

    @property
    def name(self) -> str:
        """Of what is made of it in the cache."""
        return f"{self.address.label}-{self.identity or _key(self.address) + '-unversioned'}"


def find_remote(text: str) -> Remote:
    """What is known of the file at an address; its server is not asked where the address has the digest.

    Raises InputError, MissingInput.
    """
    address = parse_address(text)
    if address.sha256:
        return Remote(address=address, identity=address.sha256[:32])
    failures = 0
    while True:
        try:
            # A byte, not HEAD: addresses are signed for one method.
            with _open(address, {"Range": "bytes=0-0"}) as reply:
                return Remote(address=address, identity=_State.of(reply).identity(address))
        except _RangeRefusedError:  # an empty file
            return Remote(address=address, identity=None)
        except _InterruptedError as error:
            failures += 1
            _pause(f"{address} could not be reached", error, failures, left="Nothing was downloaded yet")


def _key(address: Address) -> str:
    return hashlib.sha256(address.url.encode()).hexdigest()[:16]


# Downloading ----------------------------------------------------------------------------------------------------


def download(source: str | Remote, *, space_factor: float = 1.0) -> Path:
    """The file at an address, from the cache where it is there whole, under a name that changes with its content.

    What a broken or killed download left is gone on with, if the server still has that very file, else begun again.
    Processes that want the same file wait for each other. space_factor: the disk must have room for so many times the
    file. Raises InputError for a wrong address or content, MissingInput for what cannot be had, NotEnoughSpace.
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


class _InterruptedError(Exception):
    """A try that ended too early; the next may do better."""


class _RangeRefusedError(Exception):
    """The server has no such part of the file. size: of all of it, as the server says."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size = size


@dataclass(frozen=True, kw_only=True)
class _State:
    """Which file a partial one is a part of. validator: what If-Range asks for, "" where there is nothing to ask for.

    version: ETag or date, weak ones too: enough to tell files apart, not to join parts.
    """

    validator: str
    version: str
    size: int | None

    @classmethod
    def of(cls, reply: http.client.HTTPResponse) -> "_State":
        etag, date = reply.headers.get("ETag", ""), reply.headers.get("Last-Modified", "")
        strong = etag if etag.startswith('"') else ""
        size = _part(reply)[1] if reply.status == 206 else _length(reply)
        return cls(validator=strong or date, version=etag or date, size=size)

    def identity(self, address: Address) -> str | None:
        if not self.version:
            return None
        return hashlib.sha256(f"{address.url}\n{self.version}\n{self.size}".encode()).hexdigest()[:16]


def _state_file(partial: Path) -> Path:
    return partial.with_suffix(".json")


def _read_state(partial: Path) -> _State | None:
    """Of the partial file that is there; None where it cannot be gone on with."""
    try:
        state = _State(**json.loads(_state_file(partial).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return state if state.validator and partial.is_file() and partial.stat().st_size else None


def _fetch_whole(address: Address, partial: Path, *, space_factor: float) -> _State:
    """Fill `partial`, in as many tries as it takes as long as they bring something."""
    failures, most = 0, 0
    with _progress_bar(f"download {address.label}") as bar:
        while True:
            try:
                return _fetch(address, partial, bar, space_factor=space_factor)
            except _InterruptedError as error:
                failures = 1 if bar.n >= most + _PIECE_BYTES else failures + 1
                most = max(most, bar.n)
                left = "Whatever the download brought is kept, and the next start goes on from there"
                _pause(f"{address} could not be downloaded", error, failures, left=left)


def _progress_bar(text: str, *, total: int | None = None) -> tqdm:
    interval = 1.0 if sys.stderr.isatty() else 10.0
    return tqdm(desc=text, total=total, unit="B", unit_scale=True, mininterval=interval)


def _pause(what: str, error: Exception, failures: int, *, left: str = "") -> None:
    """Wait before the next try, longer each time. Raises MissingInput when there were enough.

    left: what is kept of them all, a sentence.
    """
    if failures >= _MOST_FAILURES:
        advice = ". ".join(["check the address and the network", *([left] if left else [])])
        raise MissingInput(f"{what} in {failures} tries: {error}; {advice}")
    pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (failures - 1))
    logger.warning("%s: %s; trying again in %.1f s", what, error, pause)
    time.sleep(pause)


def _fetch(address: Address, partial: Path, bar: tqdm, *, space_factor: float) -> _State:
    """One try: go on with `partial` or begin it. Raises _InterruptedError."""
    state, headers, have = _read_state(partial), {}, 0
    if state:
        have = partial.stat().st_size
        headers = {"Range": f"bytes={have}-", "If-Range": state.validator}
    try:
        reply = _open(address, headers)
    except _RangeRefusedError as refused:
        if state and refused.size == have == state.size:  # ended between the last byte and the new name
            return state
        partial.unlink(missing_ok=True)
        raise _InterruptedError("the server has another file now") from None
    with reply:
        if reply.status == 206 and state and (_part(reply)[0], _State.of(reply)) != (have, state):
            partial.unlink()
            raise _InterruptedError("the server sent a part of another file than was asked for")
        if reply.status != 206 or not state:
            state, have = _begin(address, reply, partial), 0
        require_free_space(partial, int((state.size or 0) * space_factor) - have)
        bar.total, bar.n, bar.initial = state.size, have, have
        bar.refresh()
        _receive(reply, partial, bar)
    if state.size is not None and bar.n != state.size:
        raise _InterruptedError(f"the connection ended after {bar.n:,} of {state.size:,} bytes")
    return state


def _begin(address: Address, reply: http.client.HTTPResponse, partial: Path) -> _State:
    """Start from the first byte: an empty partial file, and beside it which file it will be."""
    state = _State.of(reply)
    size = "of unknown size" if state.size is None else f"{state.size / 1e6:,.1f} MB"
    again = "begun again, the server cannot resume it or has another file now" if partial.is_file() else size
    logger.info("downloading %s: %s", address, again)
    partial.write_bytes(b"")
    write_json(_state_file(partial), {"validator": state.validator, "version": state.version, "size": state.size})
    return state


def _receive(reply: http.client.HTTPResponse, partial: Path, bar: tqdm) -> None:
    with open(partial, "ab", buffering=0) as file:
        while piece := _read_piece(reply):
            try:
                file.write(piece)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise NotEnoughSpace(f"the disk ran full while {partial} was written; ALPACA_CACHE moves it") from error
            bar.update(len(piece))


def _read_piece(reply: http.client.HTTPResponse) -> bytes:
    try:
        return reply.read1(_PIECE_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(f"the connection broke ({type(error).__name__})") from None


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


# Uploading ------------------------------------------------------------------------------------------------------


def upload(file: Path, place: str, *, on_piece: Callable[[], object] = lambda: None) -> str:
    """PUT a file below an address, as a stream, and return where it is: the server's Location, else where it was sent.

    on_piece is called often; what it raises ends the upload. Raises InputError, MissingInput.
    """
    given = parse_address(place)
    parts = urllib.parse.urlsplit(given.url)
    url = urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{urllib.parse.quote(file.name)}"))
    address = dataclasses.replace(given, url=url)
    failures = 0
    while True:
        try:
            return _put(address, file, on_piece)
        except _InterruptedError as error:
            failures += 1
            _pause(f"{address} could not be uploaded", error, failures)


def _put(address: Address, file: Path, on_piece: Callable[[], object]) -> str:
    size = file.stat().st_size
    headers = {"Content-Length": str(size), "Content-Type": "application/x-tar"}
    with open(file, "rb") as source, _progress_bar(f"upload {address.label}", total=size) as bar:

        def pieces() -> Iterator[bytes]:
            while piece := source.read(_PIECE_BYTES):
                on_piece()
                yield piece
                bar.update(len(piece))

        with _open(address, headers, body=pieces()) as reply:
            location = reply.headers.get("Location")
    return _locate(address, location)


def _locate(address: Address, location: str | None) -> str:
    """Where a file is that was put to `address`, by the server's word if that is an address."""
    if not location:
        return str(address)
    try:
        place = urllib.parse.urljoin(address.url, location)
        _split(place)
    except ValueError:  # the file is there all the same
        logger.warning("%s: the server's Location is no address; the file should be where it was sent", address)
        return str(address)
    return place


# HTTP -----------------------------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, from https to https alone; a password stays with its own host."""

    def http_error_302(self, req, fp, code, msg, headers):
        try:
            _check_redirect(req, headers.get("Location", ""))
        except InputError:
            fp.close()
            raise
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _check_redirect(request: urllib.request.Request, location: str) -> None:
    here, schemes = parse_address(request.full_url), ("https",) if request.type == "https" else _SCHEMES
    try:
        new = urllib.parse.urljoin(request.full_url, location)
        scheme = urllib.parse.urlsplit(new).scheme
    except ValueError:
        raise InputError(f"{here} redirects to what is no address; the server is at fault, or the address") from None
    if scheme not in schemes:
        raise InputError(
            f"{here} redirects to an address of the scheme {scheme!r}; from there only {' and '.join(schemes)} may "
            "follow"
        )
    try:
        _split(new)
    except InputError as error:
        raise InputError(f"{here} redirects elsewhere: {error}") from error


def _make_opener() -> urllib.request.OpenerDirector:
    """urllib's, without its file, ftp and data addresses; proxies are those of the environment."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirects,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _open(
    address: Address, headers: dict[str, str], *, body: Iterator[bytes] | None = None
) -> http.client.HTTPResponse:
    """GET the file or a part of it, or PUT `body`.

    Raises _InterruptedError, _RangeRefusedError, InputError, MissingInput.
    """
    asked = {"Accept-Encoding": "identity", "User-Agent": "cog-alpaca", **headers}
    request = urllib.request.Request(address.url, body, headers=asked, method="PUT" if body else "GET")
    if address.authorization:
        request.add_unredirected_header("Authorization", address.authorization)
    try:
        return _make_opener().open(request, timeout=_STORING_S if body else _TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            raise _explain(address, error) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise InputError(f"{address}: its certificate is not valid here ({reason.verify_message})") from None
        said = getattr(reason, "strerror", None) or type(reason).__name__  # messages of http.client quote addresses
        raise _InterruptedError(f"no connection ({said})") from None


def _explain(address: Address, error: urllib.error.HTTPError) -> Exception:
    if error.code == 416:
        size = re.fullmatch(r"bytes \*/([0-9]{1,18})", error.headers.get("Content-Range", ""))
        return _RangeRefusedError(int(size[1]) if size else None)
    if error.code in _PASSING:
        return _InterruptedError(f"the server answered HTTP {error.code}")
    advice = "check the address"
    if error.code in (401, 403):
        advice = "check its password or token; a signed address ends at its time"
    return MissingInput(f"{address}: the server answered HTTP {error.code}; {advice}")


def _length(reply: http.client.HTTPResponse) -> int | None:
    text = reply.headers.get("Content-Length", "")
    if text and not re.fullmatch(r"[0-9]{1,18}", text):
        raise _InterruptedError("the server's Content-Length is no number of bytes")
    return int(text) if text else None


def _part(reply: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte of a partial answer, and the size of the whole file."""
    match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", reply.headers.get("Content-Range", ""))
    if not match:
        raise _InterruptedError("the server sent a part of the file without saying which")
    return int(match[1]), int(match[2]) if match[2].isdigit() else None

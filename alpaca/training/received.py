"""The data of a training that a client asks for: an upload, or an address the operator allows. Never a path.

A client that may name paths has this machine read its files, and one that may name any address has it ask servers that
the client itself cannot reach.
"""

import base64
import binascii
import re
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass
from pathlib import Path

from alpaca.data.sources.tables import is_table
from alpaca.errors import AlpacaError, InputError, MissingInput
from alpaca.files.names import quote_name
from alpaca.files.network.addresses import Address, is_address, parse_address
from alpaca.files.network.requests import iterate_pieces, open_reply
from alpaca.files.network.retries import InterruptedTry

MOST_BYTES = 256 << 20  # Alpaca's 52,002 examples have 22 MB; as Python objects they take several times that
MOST_DOWNLOAD_S = 600.0
_DATA_URL = re.compile(r"data:([^,]{0,200}),")
_BASE64_PIECE = 4 << 20  # characters decoded at once; a multiple of 4


class DownloadStopped(AlpacaError):
    """The training was cancelled while its data was on the way."""


@dataclass(frozen=True, kw_only=True)
class ReceivedData:
    """A file of examples. is_upload: it came from the client, so that errors may quote what is in it."""

    path: Path
    shown: str  # in messages, in place of the path
    is_upload: bool


def receive_data(data: str, folder: Path, *, allowed: Sequence[str], stop: threading.Event) -> ReceivedData:
    """Write what a client gave as `data` into a file in `folder`.

    data: a data URL, or an http(s) address within `allowed` (each a file or, with a slash at its end, all below it).
    Setting `stop` ends a download at once.
    Raises InputError for all else and for more than MOST_BYTES, MissingInput for a file that cannot be had in
    MOST_DOWNLOAD_S, DownloadStopped.
    """
    path = folder / "data.json"
    if match := _DATA_URL.match(data):
        _write_data_url(data, match, path)
        _refuse_table(path)
        return ReceivedData(path=path, shown="data", is_upload=True)
    if not is_address(data):
        raise InputError(
            f"data: expected the examples themselves as a data URL (data:application/json;base64,…), or an http(s) "
            f"address that the operator allows; found {quote_name(data)}. Clients may not name files of the server: "
            "upload the file, as `cog train -i data=@FILE` does"
        )
    address = parse_address(data)
    _require_allowed(address, allowed)
    _download(address, path, allowed=allowed, stop=stop)
    return ReceivedData(path=path, shown=f"data from {address}", is_upload=False)


# Uploads --------------------------------------------------------------------------------------------------------


def _write_data_url(data: str, match: re.Match[str], path: Path) -> None:
    """Decode a data URL (RFC 2397) into a file. Raises InputError."""
    if len(data) > MOST_BYTES * 4 // 3 + match.end() + 4:
        raise _too_large()
    if not match[1].lower().replace(" ", "").endswith(";base64"):
        content = urllib.parse.unquote_to_bytes(data[match.end() :])
        path.write_bytes(content)
        return
    with open(path, "wb") as file:
        for start in range(match.end(), len(data), _BASE64_PIECE):
            try:
                file.write(base64.b64decode(data[start : start + _BASE64_PIECE], validate=True))
            except (binascii.Error, ValueError):
                raise InputError("data: expected base64 after ;base64, in the data URL, found other text") from None


def _refuse_table(path: Path) -> None:
    """Raise InputError for Parquet and Arrow: nothing in them bounds what a few bytes unpack to."""
    with open(path, "rb") as file:
        if is_table(file.read(8)):
            raise InputError(
                "data: Parquet and Arrow files are not taken over HTTP; send JSON, JSON lines or CSV, packed by gzip "
                "where it is large, or train by hand in the image: python train.py --data_path …"
            )


def _too_large() -> InputError:
    return InputError(
        f"data: expected at most {MOST_BYTES >> 20} MiB of examples, found more; train on a part of them, or by hand "
        "in the image: python train.py --data_path …"
    )


# Addresses ------------------------------------------------------------------------------------------------------


def _require_allowed(address: Address, allowed: Sequence[str]) -> None:
    if not address.is_within(allowed):
        raise InputError(
            f"data: the operator of this server does not allow the address {quote_name(str(address))}. Upload the file "
            "instead, as a data URL; or the operator starts the server with ALPACA_DATA_ADDRESSES=https://host/folder/"
        )


def _download(address: Address, path: Path, *, allowed: Sequence[str], stop: threading.Event) -> None:
    """Download a file in a thread of its own, which is left to itself where it is stopped or takes too long.

    A server that sends nothing can hold a thread in its read for half a minute, and nothing wakes it up.
    """
    done: Future[None] = Future()
    abandoned = threading.Event()

    def run() -> None:
        try:
            _store(address, path, allowed=allowed, abandoned=abandoned)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="data download", daemon=True).start()
    deadline = time.monotonic() + MOST_DOWNLOAD_S
    try:
        while True:
            try:
                return done.result(timeout=0.1)
            except NotDone:
                if stop.is_set():
                    raise DownloadStopped("cancelled while its data was downloaded") from None
                if time.monotonic() > deadline:
                    raise MissingInput(
                        f"data: {address} sent no whole file within {MOST_DOWNLOAD_S:.0f} s; upload it instead"
                    ) from None
    finally:
        abandoned.set()


def _store(address: Address, path: Path, *, allowed: Sequence[str], abandoned: threading.Event) -> None:
    num_bytes = 0
    try:
        with (
            open_reply(address, {}, may_follow=lambda target: target.is_within(allowed)) as reply,
            open(path, "wb") as file,
        ):
            for piece in iterate_pieces(reply):
                num_bytes += len(piece)
                if abandoned.is_set():
                    return
                if num_bytes > MOST_BYTES:
                    raise _too_large()
                file.write(piece)
        _refuse_table(path)
    except InterruptedTry as error:
        raise MissingInput(f"data: {address} could not be downloaded: {error}; try again, or upload the file") from None

"""Files sent to http and https addresses as streams."""

import dataclasses
import logging
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

from alpaca.files.network.addresses import Address, parse_address, split_address
from alpaca.files.network.requests import open_reply
from alpaca.files.network.retries import retry
from alpaca.files.progress import progress_bar

logger = logging.getLogger(__name__)
_PIECE_BYTES = 1 << 20


def upload(file: Path, place: str, *, on_piece: Callable[[], object] = lambda: None) -> str:
    """PUT a file below the address `place`; return its address: the server's Location, else where it was sent.

    on_piece: called before each MiB; an exception it raises ends the upload. Raises InputError for a wrong address,
    MissingInput where the server refuses or cannot be reached.
    """
    given = parse_address(place)
    parts = urllib.parse.urlsplit(given.url)
    url = urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{urllib.parse.quote(file.name)}"))
    address = dataclasses.replace(given, url=url)
    return retry(lambda: _put(address, file, on_piece), what=f"{address} could not be uploaded")


def _put(address: Address, file: Path, on_piece: Callable[[], object]) -> str:
    size = file.stat().st_size
    headers = {"Content-Length": str(size), "Content-Type": "application/x-tar"}
    with open(file, "rb") as source, progress_bar(f"upload {address.label}", total=size) as bar:

        def pieces() -> Iterator[bytes]:
            while piece := source.read(_PIECE_BYTES):
                on_piece()
                yield piece
                bar.update(len(piece))

        with open_reply(address, headers, body=pieces()) as reply:
            location = reply.headers.get("Location")
    return _locate(address, location)


def _locate(address: Address, location: str | None) -> str:
    """The address of a file that was sent to `address`: the server's Location where that is a valid one."""
    if not location:
        return str(address)
    try:
        place = urllib.parse.urljoin(address.url, location)
        split_address(place)
    except ValueError:  # the upload itself succeeded all the same
        logger.warning("%s: the server's Location is no address; the file should be where it was sent", address)
        return str(address)
    return place

"""Reads requests' bodies: each within a size and a time, all together within a share of memory."""

import asyncio
import contextlib
import ctypes
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from deploy.gate.rules import Refused

_KEPT_BYTES = 1 << 20  # what is larger is taken from the kernel, and goes back to it at once
_M_MMAP_THRESHOLD = -3  # glibc's number for mallopt

Receive = Callable[[], Awaitable[dict[str, Any]]]

_BODY_S = 60.0  # for a client to send its whole request


def give_large_ones_back() -> None:
    """Have freed bodies leave this process (glibc).

    Otherwise malloc takes the second large body, and all later ones, from its heap, which shrinks from its end alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


class Memory:
    """What all requests together may hold of their bodies, whether they arrive, wait, or are answered."""

    def __init__(self, most_bytes: int) -> None:
        self.num_bytes, self.most_bytes = 0, most_bytes

    @contextlib.contextmanager
    def held(self) -> Iterator["Held"]:
        """One request's share, given back with the block."""
        held = Held(self)
        try:
            yield held
        finally:
            held.set(0)


class Held:
    """One request's share of the memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._num_bytes = memory, 0

    def set(self, num_bytes: int) -> None:
        """Raises Refused where it would grow beyond what there is for all."""
        change = num_bytes - self._num_bytes
        if change > 0 and self._memory.num_bytes + change > self._memory.most_bytes:
            raise Refused(503, "too many requests are being sent; try again later")
        self._memory.num_bytes += change
        self._num_bytes = num_bytes


async def read_body(headers: Mapping[str, str], receive: Receive, most_bytes: int, held: Held) -> bytes:
    """The whole body. Raises Refused for one that is too large or too slow, or whose client has gone."""
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")[:20]) > most_bytes:
        raise _too_large(most_bytes)
    collecting = asyncio.ensure_future(_collect_body(receive, most_bytes, held))
    try:
        await asyncio.wait({collecting}, timeout=_BODY_S)
        if collecting.done():
            return collecting.result()
        raise Refused(408, f"the request was not there within {_BODY_S:.0f} s")
    finally:
        collecting.cancel()
        del collecting  # its error holds this frame, and so itself and the connection, as with asyncio.wait_for


async def _collect_body(receive: Receive, most_bytes: int, held: Held) -> bytes:
    body = bytearray()
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client went away")
            body += message.get("body", b"")
            if len(body) > most_bytes:
                raise _too_large(most_bytes)
            held.set(len(body))
            if not message.get("more_body"):
                return bytes(body)
    finally:
        body.clear()  # an exception that is on its way refers to this frame, for longer than to what `held` counts


def _too_large(most_bytes: int) -> Refused:
    return Refused(413, f"a request may have {most_bytes >> 20} MiB")

"""One request to the runtime and its answer, over a connection of its own.

A connection that is kept for the next request may be dead by then, which cannot be told from a runtime that took the
request and died. Only what Cog's runtime sends is understood: an HTTP client's layers cost more than all else that the
gate does with a streamed piece.
"""

import asyncio
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from http import HTTPStatus

_PART_BYTES = 1 << 16


class NotReached(Exception):
    """Nobody listens at the runtime's address: nothing was sent."""


class Unanswered(Exception):
    """The request was sent, and the connection broke before the head of an answer came."""


class BrokenOff(Exception):
    """An answer ended in the middle."""


class Reply:
    """The runtime's answer: `status`, `headers` with names in lower case, and its content, which is read but once.

    open_s: an answer that is not whole is not given up sooner, in seconds from now.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, open_s: float = 0.0) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._reader, self._writer = reader, writer
        self._open_until = asyncio.get_running_loop().time() + open_s
        self._is_whole = False
        self._first: bytes | None = None
        self._rest = self._read_pieces()

    async def read_head(self) -> None:
        """Raises OSError, EOFError, ValueError, asyncio.LimitOverrunError."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        _, status, *_ = first.split()
        self.status = int(status)
        fields = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in fields}

    async def first_piece(self) -> bytes:
        """What `pieces` begins with, b"" where there is nothing. Raises BrokenOff."""
        if self._first is None:
            self._first = await anext(self._rest, b"")
        return self._first

    async def pieces(self) -> AsyncIterator[bytes]:
        """The content, whole chunks of it, as they come. Raises BrokenOff."""
        if first := await self.first_piece():
            yield first
        async for piece in self._rest:
            yield piece

    async def _read_pieces(self) -> AsyncGenerator[bytes, None]:
        is_chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        left, waiting = float(self.headers.get("content-length", math.inf)), b""
        try:
            while left > 0:
                data = await self._reader.read(_PART_BYTES)
                if not data and (is_chunked or left < math.inf):
                    raise BrokenOff("the connection ended within an answer")
                if is_chunked:
                    data, waiting, has_ended = take_chunks(waiting + data)
                    left = 0 if has_ended else left
                elif not data:
                    left = 0
                left -= len(data)
                self._is_whole = left <= 0
                if data:
                    yield data
        except (OSError, ValueError):
            raise BrokenOff("the connection broke, or what came is no HTTP") from None

    def close(self) -> None:
        """Done with it. Where the answer is not whole the runtime ends what it does for it."""
        loop = asyncio.get_running_loop()
        if self._is_whole or self.status >= HTTPStatus.BAD_REQUEST or loop.time() >= self._open_until:
            self._writer.close()
        else:
            loop.call_at(self._open_until, self._writer.close)


def take_chunks(coded: bytes) -> tuple[bytes, bytes, bool]:
    """Of bytes in HTTP's chunked coding: the content of all whole chunks, what follows them, whether the end was there.

    Raises ValueError for what is not in that coding.
    """
    parts, at = [], 0
    while (line_end := coded.find(b"\r\n", at)) >= 0:
        size = int(coded[at:line_end], 16)
        end = line_end + 2 + size
        if size == 0:
            return b"".join(parts), b"", True
        if len(coded) < end + 2:
            break
        parts.append(coded[line_end + 2 : end])
        at = end + 2
    return b"".join(parts), coded[at:], False


def abandon(asking: "asyncio.Future[Reply]") -> None:
    """End a request whose answer nobody wants, also where it has come at this moment."""
    asking.cancel()
    asking.add_done_callback(lambda done: done.cancelled() or done.exception() or done.result().close())


async def exchange(
    host: str,
    port: int,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    tls: ssl.SSLContext | None = None,
    open_s: float = 0.0,
) -> Reply:
    """Send a request; returns once the answer's head is there. Raises NotReached, Unanswered.

    open_s: for so long the connection stays, also where nobody waits for the answer any more.
    """
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    except OSError:
        raise NotReached(f"nobody listens at {host}:{port}") from None
    reply = Reply(reader, writer, open_s=open_s)
    sent = {"host": f"{host}:{port}", "connection": "close", "content-length": str(len(body)), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
    try:
        writer.write("\r\n".join(lines).encode("latin-1"))
        writer.write(body)
        await reply.read_head()
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
        reply.close()
        raise Unanswered("the connection ended before an answer began") from None
    except BaseException:
        reply.close()
        raise
    return reply

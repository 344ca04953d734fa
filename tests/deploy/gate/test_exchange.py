"""The runtime's answers, as h11 reads them, however the network cuts them."""

import asyncio
import contextlib
import itertools
import random

import h11
import pytest

from deploy.gate.exchange import BrokenOff, NotReached, Reply, Unanswered, abandon, exchange, take_chunks

CHUNKS = [b"event: output\ndata: 1\n\n", b"\r\n0\r\n\r\n", b"x" * 70_000, b"A"]
CODED = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in CHUNKS)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = HEAD + CODED + b"0\r\n\r\n"


def read_by_h11(answer: bytes) -> bytes:
    http = h11.Connection(h11.CLIENT)
    for event in (h11.Request(method="GET", target="/", headers=[("host", "x")]), h11.EndOfMessage()):
        http.send(event)
    http.receive_data(answer)
    content = b""
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        content += bytes(event.data) if isinstance(event, h11.Data) else b""
    return content


async def ask_one_that_answers(*parts: bytes) -> tuple[Reply, list[bytes]]:
    """The answer of a server that sends these parts and closes the connection."""
    has_ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()
        has_ended.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        try:
            reply, pieces = await exchange(host, port, "GET", "/", {}, b""), []
            with contextlib.closing(reply):
                async for piece in reply.pieces():
                    pieces.append(piece)
        except BrokenOff:
            pieces.append(b"BROKEN")
        finally:
            await has_ended.wait()
            await asyncio.sleep(0.01)  # both ends are closed then
        return reply, pieces


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    places = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(6))})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def test_an_answer_is_what_h11_reads_however_it_is_cut():
    for seed in range(30):
        reply, pieces = asyncio.run(ask_one_that_answers(*cut(WHOLE, random.Random(seed))))
        assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
        assert b"".join(pieces) == read_by_h11(WHOLE) == b"".join(CHUNKS)


def test_chunks_are_the_same_at_every_cut():
    coded = CODED.replace(CHUNKS[2], b"y" * 3).replace(b"11170", b"3") + b"0\r\n\r\n"
    for at in range(len(coded) - 4):  # the end is its first line: a trailer has no meaning here
        first, rest, ended = take_chunks(coded[:at])
        second, left, ended_now = take_chunks(rest + coded[at:])
        assert (first + second, left, ended, ended_now) == (take_chunks(coded)[0], b"", False, True)


@pytest.mark.parametrize("missing", range(5, 200, 13))
def test_an_answer_without_its_end_is_broken_off(missing):
    _, pieces = asyncio.run(ask_one_that_answers(WHOLE[:-missing]))
    assert pieces[-1] == b"BROKEN"
    assert b"".join(CHUNKS).startswith(b"".join(pieces[:-1]))


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", [b"abc"]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", [b"abc", b"BROKEN"]),
        (b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n", []),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", [b"abc"]),
        (HEAD + b"zz\r\nabc\r\n", [b"BROKEN"]),
    ],
)
def test_other_ways_to_end(answer, pieces):
    assert asyncio.run(ask_one_that_answers(answer))[1] == pieces


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-", b"nonsense\r\n\r\n"])
def test_no_head_is_no_answer(answer):
    with pytest.raises(Unanswered, match="before an answer began"):
        asyncio.run(ask_one_that_answers(answer))


@pytest.mark.parametrize("has_come", [True, False])
def test_an_answer_that_nobody_wants_is_closed(has_come):
    """Also one that came before anybody could read it: the runtime would work on for nobody."""

    async def leave() -> bytes:
        was_read: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD if has_come else b"HTTP/1.1 ")
            was_read.set_result(await reader.read())
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            asking = asyncio.ensure_future(exchange(*server.sockets[0].getsockname(), "GET", "/", {}, b""))
            await asyncio.wait({asking}, timeout=None if has_come else 0.05)
            assert asking.done() == has_come
            abandon(asking)
            return await asyncio.wait_for(was_read, 5)

    assert asyncio.run(leave()) == b""


def test_nobody_there():
    with pytest.raises(NotReached, match="nobody listens at"):
        asyncio.run(exchange("127.0.0.1", 9, "GET", "/", {}, b""))

"""Requests' heads: what they may hold; and how long a connection is kept for the next one."""

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.deploy.gate.test_gate import RunningGate, running
from tests.deploy.gate.test_slow_clients import address, closed

FIRST = b"GET /health-check HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> Iterator[RunningGate]:
    with running(tmp_path_factory.mktemp("gate")) as gate:
        yield gate


def ask(gate: RunningGate, *parts: bytes) -> tuple[int, dict]:
    """The status and content of the answer to a request; the connection is closed."""
    with socket.create_connection(address(gate), timeout=5) as connection:
        for part in parts:
            connection.sendall(part)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, dict]:
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    length = 0
    while (line := reader.readline().strip().lower()) != b"":
        name, _, value = line.partition(b":")
        length = int(value) if name == b"content-length" else length
    return status, json.loads(reader.read(length))


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"X: " + b"x" * (15 << 10) + b"\r\n", 200),
        (b"X: " + b"x" * (17 << 10) + b"\r\n", 431),
        (b"X: " + b"x" * (300 << 10) + b"\r\n", 431),
        (b"X: y\r\n" * 99, 200),
        (b"X: y\r\n" * 100, 431),
    ],
)
def test_a_head_has_16_kib_and_100_headers(gate, rest, status):
    said = ask(gate, FIRST + rest + b"\r\n")
    assert said[0] == status
    if status == 431:
        assert said[1] == {"detail": "a request's head may have 16 KiB and 100 headers"}


def test_a_long_address_counts(gate):
    line = b"GET /health-check?" + b"x" * (17 << 10) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert ask(gate, line)[0] == 431


def test_a_head_that_never_ends_is_refused(gate):
    assert ask(gate, FIRST, b"X: " + b"x" * (40 << 10))[0] == 431


def test_a_body_has_one_length(gate):
    before = gate.asked()
    head = b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, said = ask(gate, head + b"2\r\n{}\r\n0\r\n\r\n")
    assert (status, said["detail"]) == (400, "a request has a Content-Length or a Transfer-Encoding, not both")
    assert gate.asked() == before


def test_a_body_that_is_not_in_chunks_is_refused(gate):
    head = b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert ask(gate, head, b"this is no size\r\n")[0] == 400
    assert gate.health()["gate"]["running"] == 0


def test_a_refused_connection_is_closed(gate):
    with socket.create_connection(address(gate), timeout=5) as connection:
        connection.sendall(FIRST + b"X: y\r\n" * 101 + b"\r\n")
        assert read_answer(connection)[0] == 431
        assert closed(connection)


def test_between_requests_a_connection_is_kept_longer_than_a_head_may_take(tmp_path):
    with running(tmp_path, bounds={"_HEAD_S": 0.5}) as gate, socket.create_connection(address(gate)) as connection:
        connection.settimeout(5)
        for _ in range(2):
            connection.sendall(FIRST + b"\r\n")
            assert read_answer(connection)[0] == 200
            time.sleep(1.2)
        connection.sendall(FIRST)
        begun = time.monotonic()
        assert closed(connection)
        assert time.monotonic() - begun < 3


@pytest.mark.slow
def test_a_connection_is_kept_longer_than_httpx_keeps_it(gate):
    with socket.create_connection(address(gate), timeout=5) as connection:
        for pause in (6, 0):
            connection.sendall(FIRST + b"\r\n")
            assert read_answer(connection)[0] == 200
            time.sleep(pause)


def test_an_idle_connection_is_closed_in_time(tmp_path):
    with running(tmp_path, bounds={"_IDLE_S": 0.5}) as gate, socket.create_connection(address(gate)) as connection:
        connection.settimeout(5)
        connection.sendall(FIRST + b"\r\n")
        assert read_answer(connection)[0] == 200
        begun = time.monotonic()
        assert closed(connection)
        assert 0.3 < time.monotonic() - begun < 3


def test_of_too_many_idle_connections_the_oldest_are_closed(tmp_path):
    with running(tmp_path, bounds={"_MOST_UNFINISHED": 5}) as gate:
        connections = [socket.create_connection(address(gate), timeout=5) for _ in range(5)]
        for connection in connections:  # the oldest is that of the fixture's client, which goes for one of these
            connection.sendall(FIRST + b"\r\n")
            assert read_answer(connection)[0] == 200
        others = [socket.create_connection(address(gate), timeout=5) for _ in range(3)]
        assert all(closed(connection) for connection in connections[:3])
        connections[-1].sendall(FIRST + b"\r\n")
        assert read_answer(connections[-1])[0] == 200
        for connection in connections + others:
            connection.close()

"""Bodies that come to nothing leave no memory behind."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.deploy.gate.test_gate import running
from tests.deploy.gate.test_slow_clients import address

MB = 10**6
HEAD = b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PIECE = b"a" * 64_000


def break_off(place: tuple[str, int]) -> None:
    """A body of 8 MB whose last byte never comes."""
    with socket.create_connection(place, timeout=20) as connection:
        connection.sendall(HEAD + b"Content-Length: 8000001\r\n\r\n" + 125 * PIECE)


def send_too_much(place: tuple[str, int]) -> None:
    """In chunks, whose sum is more than may be."""
    with socket.create_connection(place, timeout=20) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + 132 * (b"fa00\r\n" + PIECE + b"\r\n"))
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize("client", [break_off, send_too_much])
def test_the_memory_of_bodies_that_come_to_nothing_is_given_back(tmp_path, client):
    with running(tmp_path) as gate, ThreadPoolExecutor(10) as pool:
        process = psutil.Process(gate.process.pid)
        before = process.memory_info().rss
        list(pool.map(client, [address(gate)] * 60))
        deadline = time.monotonic() + 20
        while (left := process.memory_info().rss - before) > 40 * MB and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left < 40 * MB
        assert gate.predict("x").status_code == 200

"""Clients that send or read slowly: for a time, in a number, and to nobody else's harm."""

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import psutil

from tests.deploy.gate.test_gate import RunningGate, running

BODY_LATER = b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
FLOOD = b'{"input": {"prompt": "flood 200000"}}'


class SlowClient:
    """Sends a beginning, then a letter each 50 ms until the server closes the connection; notes how long it held."""

    def __init__(self, gate: RunningGate, beginning: bytes = b"GET /health-check HTTP/1.1\r\nX: ") -> None:
        self.held_s: float | None = None
        self.answer = b""
        self._socket = socket.create_connection(address(gate), timeout=0.05)
        self._socket.sendall(beginning)
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._drip, daemon=True)
        self._thread.start()

    def _drip(self) -> None:
        with self._socket, contextlib.suppress(ConnectionError):
            while True:
                with contextlib.suppress(TimeoutError):
                    if not (data := self._socket.recv(1000)):
                        break
                    self.answer += data
                self._socket.sendall(b"x")
        self.held_s = time.monotonic() - self._begun

    def wait(self) -> float:
        self._thread.join(timeout=10)
        assert self.held_s is not None
        return self.held_s


def address(gate: RunningGate) -> tuple[str, int]:
    host, port = gate.url.removeprefix("http://").split(":")
    return host, int(port)


def served_at_once(gate: RunningGate) -> bool:
    begun = time.monotonic()
    return gate.predict("x").status_code == 200 and time.monotonic() - begun < 3


def test_a_head_that_comes_slowly_is_not_waited_for(tmp_path):
    with running(tmp_path, bounds={"_HEAD_S": 0.8}) as gate:
        client = SlowClient(gate)
        assert served_at_once(gate)
        assert 0.7 < client.wait() < 4


def test_many_slow_heads_make_room_for_others(tmp_path):
    """The oldest of them goes for each newcomer."""
    with running(tmp_path, bounds={"_MOST_UNFINISHED": 20}) as gate:
        clients = [SlowClient(gate) for _ in range(50)]
        for _ in range(2):
            gate.client.close()
            gate.client = type(gate.client)(base_url=gate.url, trust_env=False)
            assert served_at_once(gate)
        gate.wait_for(lambda: sum(client.held_s is None for client in clients) <= 20)
        assert all(client.held_s is not None for client in clients[:30])
        assert clients[-1].held_s is None


def test_a_body_that_comes_slowly_is_refused_and_its_rest_not_waited_for(tmp_path):
    with running(tmp_path, bounds={"_BODY_S": 0.5, "_HEAD_S": 0.5}) as gate:
        client = SlowClient(gate, BODY_LATER)
        assert served_at_once(gate)
        assert 0.9 < client.wait() < 5
        assert client.answer.startswith(b"HTTP/1.1 408 ")


def test_many_slow_bodies_make_room_for_others(tmp_path):
    with running(tmp_path, bounds={"_MOST_UNFINISHED": 20}) as gate:
        clients = [SlowClient(gate, BODY_LATER) for _ in range(50)]
        assert served_at_once(gate)
        gate.wait_for(lambda: sum(client.held_s is None for client in clients) <= 20)
        assert gate.health()["status"] == "READY"


def test_of_too_many_connections_the_last_are_closed(tmp_path):
    with running(tmp_path, slots=1, bounds={"_MOST_CONNECTIONS": 10}) as gate, waiting(gate, 9):
        with socket.create_connection(address(gate), timeout=5) as one_more:
            assert closed(one_more)
        assert gate.health()["gate"].items() >= {"running": 1, "waiting": 8, "restarts": 0}.items()


@contextlib.contextmanager
def waiting(gate: RunningGate, count: int) -> Iterator[None]:
    """So many clients that wait for an answer, each on a connection."""
    body = b'{"input": {"prompt": "sleep 3"}}'
    head = b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(address(gate))).sendall(head + body)
        gate.wait_for(lambda: gate.health()["gate"]["waiting"] == count - 1)
        yield


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_who_does_not_read_gives_its_place_away_and_fills_no_memory(tmp_path):
    """Of an answer of 200 MB the gate holds what fits the connections' buffers."""
    with running(tmp_path, slots=1, bounds={"_READING_S": 1.0}) as gate:
        program = psutil.Process(gate.process.pid)
        before = program.memory_info().rss, program.num_fds()
        with socket.create_connection(address(gate)) as connection:
            head = b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(FLOOD)
            connection.sendall(head + FLOOD)
            gate.wait_for(lambda: gate.health()["gate"]["running"] == 1)
            assert gate.predict("next").status_code == 200  # waits for the place
            assert program.memory_info().rss - before[0] < 16 << 20
            gate.wait_for(lambda: program.num_fds() <= before[1])


def test_who_reads_slowly_but_reads_gets_all(tmp_path):
    with running(tmp_path, slots=1, bounds={"_READING_S": 1.0}) as gate:
        got = 0
        with gate.client.stream("POST", "/predictions", json={"input": {"prompt": "flood 6000"}}) as reply:
            for at, piece in enumerate(reply.iter_raw(1 << 16)):
                got += piece.count(b"event: output")
                time.sleep(0.03 if at < 60 else 0)
        assert got > 5_800  # a piece may end within the words


def test_a_place_is_free_when_the_answer_is_made_not_when_it_is_read(tmp_path):
    with running(tmp_path, slots=1) as gate:
        with gate.client.stream("POST", "/predictions", json={"input": {"prompt": "flood 3000"}}) as reply:
            pieces = reply.iter_raw(1 << 12)
            got = next(pieces)
            gate.wait_for(lambda: gate.health()["gate"]["running"] == 0)  # 3 MB of it are unread
            assert httpx.post(f"{gate.url}/predictions", json={"input": {"prompt": "x"}}).status_code == 200
            got += b"".join(pieces)
        assert got.count(b"event: output") == 3000


def test_where_much_is_unread_already_an_answer_waits_for_its_reader(tmp_path):
    with running(tmp_path, slots=1, bounds={"_MOST_UNREAD_BYTES": 0}) as gate:
        with gate.client.stream("POST", "/predictions", json={"input": {"prompt": "flood 3000"}}) as reply:
            pieces = reply.iter_raw(1 << 12)
            next(pieces)
            time.sleep(0.5)
            assert gate.health()["gate"]["running"] == 1
            assert b"".join(pieces)
        gate.wait_for(lambda: gate.health()["gate"]["running"] == 0)


def test_where_files_run_out_newcomers_wait_and_the_log_says_it_once(tmp_path):
    with running(tmp_path) as gate, contextlib.ExitStack() as stack:
        most = psutil.Process(gate.process.pid).num_fds() + 20
        resource.prlimit(gate.process.pid, resource.RLIMIT_NOFILE, (most, most))
        for _ in range(40):
            stack.enter_context(socket.create_connection(address(gate)))
        said = "new connections wait: this process may open no more files (ulimit -n)\n"
        gate.wait_for(lambda: said in gate.output)
        time.sleep(1.2)  # asyncio tries again
        assert [line for line in gate.output if "Traceback" in line or line == said] == [said]
        stack.close()
        assert served_at_once(gate)

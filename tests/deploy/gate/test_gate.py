"""The gate over HTTP, in front of a runtime without a model that dies when it is told to."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.gate.bodies import Memory
from deploy.gate.rules import Refused
from tests.deploy.gate.program import Program


class RunningGate(Program):
    """A gate and its runtime; `log` is what the runtime was asked."""

    def __init__(self, folder: Path, slots: int, rules: dict, bounds: dict, *, until: str = "READY") -> None:
        self.log = folder / "asked.txt"
        self.log.touch()
        command = [sys.executable, "-m", "tests.deploy.gate.run_gate", str(self.log)]
        command += [json.dumps(rules), json.dumps(bounds)]
        super().__init__(command, {"SLOTS": str(slots), "COG_MAX_CONCURRENCY": str(slots)})
        self.wait_for(lambda: self.health()["status"] == until)

    def health(self) -> dict:
        return self.client.get("/health-check").json()

    def predict(self, prompt: str, **options) -> httpx.Response:
        return self.client.post("/predictions", json={"input": {"prompt": prompt}}, **options)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, is_so, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def runtimes(self) -> list[int]:
        """Process ids of the runtimes that this gate has started."""
        found = subprocess.run(["pgrep", "-f", f"fake_runtime {self.log}"], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]


@contextlib.contextmanager
def running(folder: Path, *, slots: int = 2, bounds: dict | None = None, **rules) -> Iterator[RunningGate]:
    with contextlib.closing(RunningGate(folder, slots, rules, bounds or {})) as gate:
        yield gate


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> Iterator[RunningGate]:
    with running(tmp_path_factory.mktemp("gate"), slots=2) as gate:
        yield gate
        assert gate.stop() == 0
        assert gate.runtimes() == []


def test_what_passes_comes_back_as_the_runtime_said_it(gate):
    reply = gate.predict("hello")
    assert reply.status_code == 200
    assert reply.json() == {"status": "succeeded", "got": {"input": {"prompt": "hello"}}}
    assert httpx.get(f"{gate.url}/openapi.json").json() == {"path": "/openapi.json"}
    assert httpx.put(f"{gate.url}/predictions/x-1", json={"input": {"prompt": "p"}}).json()["status"] == "succeeded"
    assert httpx.post(f"{gate.url}/predictions/x-1/cancel").status_code == 200


def test_a_stream_comes_piece_by_piece(gate):
    times = []
    with httpx.stream("POST", f"{gate.url}/predictions", json={"input": {"prompt": "stream 8"}}) as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        for line in reply.iter_lines():
            if line.startswith("data"):
                times.append(time.monotonic())
    assert len(times) == 8
    assert times[-1] - times[0] > 0.2


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/shutdown", {}, 404),
        ("/predictions", {"headers": {"Host": "evil.net"}}, 403),
        ("/predictions", {"headers": {"Origin": "http://evil.net"}}, 403),
        ("/predictions", {"content": b"{"}, 400),
        ("/predictions", {"json": {"id": "../../x"}}, 422),
        ("/predictions", {"json": {"webhook": "http://127.0.0.1:1/"}}, 422),
        ("/predictions", {"json": {"input": {}, "context": {"x": "y" * (64 << 10)}}}, 413),
        ("/predictions", {"content": b" " * (9 << 20)}, 413),
        ("/predictions", {"content": iter([b" " * (1 << 20)] * 9)}, 413),
    ],
)
def test_what_does_not_pass_never_reaches_the_runtime(gate, path, options, status):
    before = gate.asked()
    reply = httpx.post(gate.url + path, **options)
    assert reply.status_code == status
    assert reply.json()["detail"]
    assert gate.asked() == before


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health-check", "GET, HEAD"),
        ("GET", "/predictions", "POST"),
        ("DELETE", "/predictions/x", "PUT"),
        ("PUT", "/predictions/x/cancel", "POST"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(gate, method, path, allow):
    reply = gate.client.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allow)


def test_an_odd_request_line_is_no_request(gate):
    host, port = gate.url.removeprefix("http://").split(":")
    for text in (b"POST /predictions HTTP/1.1\r\nHost: evil.net\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
                 b"POST http://localhost/shutdown HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
                 b"nonsense\r\n\r\n"):  # fmt: skip
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(text)
            assert b" 40" in connection.recv(100)
    assert gate.health()["status"] == "READY"


def test_who_comes_first_is_served_first(gate):
    with ThreadPoolExecutor(12) as pool:
        waiting = []
        for number in range(12):
            waiting.append(pool.submit(gate.predict, f"sleep 0.1 n{number}"))
            gate.wait_for(lambda count=number: sum(gate.health()["gate"][name] for name in ("running", "waiting"))
                          + sum(task.done() for task in waiting) > count)  # fmt: skip
        assert [task.result().status_code for task in waiting] == [200] * 12
    order = [int(line.rpartition("n")[2]) for line in gate.asked() if line.startswith("sleep 0.1 n")]
    assert all(abs(number - at) <= 1 for at, number in enumerate(order)), order  # two run at once


def test_a_slot_that_somebody_else_holds_is_waited_for(gate):
    """The runtime's own 409: of predictions that the gate does not follow, as those with respond-async."""
    with running_slots(gate, 2):
        begun = time.monotonic()
        assert gate.predict("x").status_code == 200
        assert time.monotonic() - begun > 0.2


@contextlib.contextmanager
def running_slots(gate: RunningGate, count: int) -> Iterator[None]:
    """Slots of the runtime held past the gate."""
    pid = gate.runtimes()[0]
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    port = re.search(r"\bPORT=(\d+)", Path(f"/proc/{pid}/environ").read_text())[1]
    url = f"http://{arguments[arguments.index('--host') + 1]}:{port}/predictions"
    with ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(httpx.post, url, json={"input": {"prompt": "sleep 0.5 held"}}) for _ in range(count)]
        gate.wait_for(lambda: gate.asked()[-count:] == ["sleep 0.5 held"] * count)
        yield
        assert all(task.result().status_code == 200 for task in tasks)


def test_a_client_that_leaves_is_told_to_the_runtime(gate):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gate.url}/predictions", json={"input": {"prompt": "sleep 10 left"}}, timeout=0.3)
    gate.wait_for(lambda: gate.asked()[-1] == "gone", seconds=3)
    assert gate.health()["gate"]["running"] == 0


@pytest.mark.parametrize(("resource", "seconds"), [("predictions", 0.2), ("trainings", 2.0)])
@pytest.mark.fast_rows(1)
def test_a_cancel_comes_only_when_the_worker_has_what_it_cancels(tmp_path, resource, seconds):
    """And so does the end of a connection: Cog's runtime loses one that comes while it hands the request over."""
    with running(tmp_path, serves_training=resource == "trainings") as gate, ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        left = pool.submit(
            gate.client.put, f"/{resource}/left", json={"input": {"prompt": "sleep 9 left"}}, timeout=0.1
        )
        with pytest.raises(httpx.ReadTimeout):
            left.result()
        gate.wait_for(lambda: gate.asked() == ["sleep 9 left", "gone"])
        assert seconds <= time.monotonic() - begun < seconds + 1
        begun = time.monotonic()
        asking = pool.submit(gate.client.put, f"/{resource}/c", json={"input": {"prompt": f"sleep {seconds + 0.5}"}})
        gate.wait_for(lambda: len(gate.asked()) == 3)
        assert gate.client.post(f"/{resource}/c/cancel").status_code == 200
        assert (gate.asked()[-1], seconds <= time.monotonic() - begun < seconds + 0.5) == ("cancel", True)
        assert asking.result().status_code == 200


def test_a_cancel_waits_so_long_for_what_was_answered_at_once_too(tmp_path):
    with running(tmp_path) as gate:
        begun = time.monotonic()
        body = {"input": {"prompt": "background 1"}}
        assert gate.client.put("/predictions/b", json=body, headers={"prefer": "respond-async"}).status_code == 202
        assert gate.client.post("/predictions/b/cancel").status_code == 200
        assert 0.2 <= time.monotonic() - begun < 0.9
        assert gate.asked() == ["background 1", "cancel"]


def test_a_cancel_that_comes_before_its_requests_body_waits_for_it(tmp_path):
    with running(tmp_path) as gate, ThreadPoolExecutor(1) as pool:
        body = b'{"input": {"prompt": "sleep 0.5"}}'
        host, port = gate.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=9) as connection:
            head = b"PUT /predictions/c HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body[:9])
            canceling = pool.submit(gate.client.post, "/predictions/c/cancel")
            time.sleep(0.3)
            assert not canceling.done()
            connection.sendall(body[9:])
            assert canceling.result().status_code == 200
            assert gate.asked() == ["sleep 0.5", "cancel"]
            assert b" 200 OK" in connection.recv(100)
        assert (
            gate.client.post("/predictions/other/cancel").status_code == 200
        )  # the fake's answer to any: asked at once


def test_every_client_that_leaves_a_stream_is_told_to_the_runtime(gate):
    """Whatever the gate does at that moment: it sends a piece at most of them."""
    for _ in range(10):
        before = len(gate.asked())
        with gate.client.stream("POST", "/predictions", json={"input": {"prompt": "flood 100000"}}) as reply:
            next(reply.iter_raw())
        gate.wait_for(lambda: gate.health()["gate"]["running"] == 0, seconds=2)
        gate.wait_for(lambda count=before: len(gate.asked()) == count + 2, seconds=2)
        assert gate.asked()[before:] == ["flood 100000", "gone"]


def test_keys_are_asked_for(tmp_path):
    with running(tmp_path, keys=["k1"]) as gate:
        assert gate.predict("x").status_code == 401
        assert gate.predict("x", headers={"Authorization": "Bearer k1"}).status_code == 200
        with_key = gate.client.get("/health-check", headers={"Authorization": "Bearer k1"}).json()
        assert with_key["setup"] == {"logs": "at /a/folder"}
        shown = {name: value for name, value in with_key.items() if name not in ("setup", "gate")}
        without = gate.client.get("/health-check").json()
        assert {name: value for name, value in without.items() if name != "gate"} == shown


def test_a_dead_worker_comes_back_and_who_waits_is_served(tmp_path):
    with running(tmp_path, slots=1) as gate:
        first = gate.runtimes()
        with ThreadPoolExecutor(3) as pool:
            running_one = pool.submit(gate.predict, "sleep 1")
            gate.wait_for(lambda: gate.health()["gate"]["running"] == 1)
            dying = pool.submit(gate.predict, "die")
            gate.wait_for(lambda: gate.health()["gate"]["waiting"] == 1)
            waiting = pool.submit(gate.predict, "after")
            gate.wait_for(lambda: gate.health()["gate"]["waiting"] == 2)
            assert running_one.result().status_code == 200
            assert dying.result().json()["status"] == "failed"
            gate.wait_for(lambda: gate.health()["status"] == "STARTING")
            early = gate.predict("early")
            assert (early.status_code, early.headers["retry-after"]) == (503, "5")
            assert waiting.result().json()["status"] == "succeeded"
        assert gate.health()["gate"]["restarts"] == 1
        assert gate.runtimes() != first
        assert gate.asked() == ["sleep 1", "die", "after"]


def test_a_killed_runtime_comes_back_and_who_waits_is_served(tmp_path):
    """All who wait, and who ran without having been answered, too: that is asked again."""
    with running(tmp_path, slots=1) as gate, ThreadPoolExecutor(4) as pool:
        running_one = pool.submit(gate.predict, "sleep 1")
        gate.wait_for(lambda: gate.asked() == ["sleep 1"])
        waiting = [pool.submit(gate.predict, f"after {number}") for number in range(3)]
        gate.wait_for(lambda: gate.health()["gate"]["waiting"] == 3)
        os.kill(gate.runtimes()[0], signal.SIGKILL)
        assert [task.result().status_code for task in (running_one, *waiting)] == [200] * 4
        assert gate.asked().count("sleep 1") == 2
        assert gate.health()["gate"]["restarts"] == 1


def test_a_prediction_whose_runtime_dies_is_asked_again_once(tmp_path):
    with running(tmp_path) as gate:
        assert gate.predict("exit-once").json()["status"] == "succeeded"
        assert (gate.asked(), gate.health()["gate"]["restarts"]) == (["exit-once"] * 2, 1)


@pytest.mark.parametrize("prompt", ["crash-once", "crash-once events"])
@pytest.mark.fast_rows(1)
def test_a_prediction_whose_worker_dies_is_asked_again_once(tmp_path, prompt):
    """The runtime outlives its worker, and answers for it."""
    with running(tmp_path) as gate:
        assert gate.predict(prompt).json()["status"] == "succeeded"
        assert (gate.asked(), gate.health()["gate"]["restarts"]) == ([prompt] * 2, 1)


@pytest.mark.parametrize("given", [{"webhook": "http://127.0.0.1:9/"}, {"id": "c"}])
@pytest.mark.fast_rows(1)
def test_what_a_worker_died_of_is_told_where_it_may_not_be_asked_again(tmp_path, given):
    resource = "predictions" if "webhook" in given else "trainings"
    with running(tmp_path, webhooks=["http://127.0.0.1:9/"], serves_training=resource == "trainings") as gate:
        body = {"input": {"prompt": "crash-once"}, **given}
        assert gate.client.post(f"/{resource}", json=body).json()["error"] == "Worker crashed"
        gate.wait_for(lambda: gate.health()["gate"]["restarts"] == 1)
        gate.wait_for(lambda: gate.health()["status"] == "READY")
        assert gate.asked() == ["crash-once"]


def test_what_the_runtime_dies_of_is_not_asked_a_third_time(tmp_path):
    """By its third death the server would be given up."""
    with running(tmp_path) as gate:
        reply = gate.predict("exit")
        assert (reply.status_code, reply.json()["detail"]) == (503, "the server was interrupted; try again")
        gate.wait_for(lambda: gate.health()["gate"]["restarts"] == 2)
        gate.wait_for(lambda: gate.health()["status"] == "READY")
        assert gate.asked() == ["exit"] * 2


@pytest.mark.parametrize("given", [{"webhook": "http://127.0.0.1:9/"}, {"prefer": "respond-async"}])
@pytest.mark.fast_rows(1)
def test_what_may_have_begun_elsewhere_is_not_asked_again(tmp_path, given):
    """A webhook may have been sent, and a client that does not wait may ask by itself."""
    with running(tmp_path, webhooks=["http://127.0.0.1:9/"]) as gate:
        body = {"input": {"prompt": "exit"}, **({"webhook": given["webhook"]} if "webhook" in given else {})}
        headers = {"prefer": given["prefer"]} if "prefer" in given else {}
        assert gate.client.post("/predictions", json=body, headers=headers).status_code == 503
        gate.wait_for(lambda: gate.health()["gate"]["restarts"] == 1)
        gate.wait_for(lambda: gate.health()["status"] == "READY")
        assert gate.asked() == ["exit"]


def test_a_streamed_answer_that_breaks_off_says_so(tmp_path):
    asked = {"json": {"input": {"prompt": "stream 200"}}}
    with running(tmp_path) as gate, gate.client.stream("POST", "/predictions", **asked) as reply:
        pieces = reply.iter_raw()
        got = [next(pieces)]
        os.kill(gate.runtimes()[0], signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            got.extend(pieces)
        first, *_, last, rest = b"".join(got).decode().split("\n\n")
        assert (first, rest) == ("event: output\ndata: 0", "")
        assert last.startswith('event: error\ndata: {"error": "The server was interrupted')


def test_an_answer_that_breaks_off_is_no_whole_one(tmp_path):
    with running(tmp_path) as gate, pytest.raises(httpx.RemoteProtocolError, match="received 50 bytes, expected 100"):
        gate.predict("half")


def test_a_report_that_cannot_be_read_is_no_death(tmp_path):
    with running(tmp_path) as gate:
        Path(f"{gate.log}.garbled").touch()
        gate.wait_for(lambda: any("health could not be read: UnicodeDecodeError" in line for line in gate.output))
        assert gate.predict("x").status_code == 200
        Path(f"{gate.log}.garbled").unlink()
        time.sleep(0.6)
        assert (gate.health()["status"], gate.health()["gate"]["restarts"]) == ("READY", 0)


def test_a_worker_that_dies_while_it_is_started_is_a_death(tmp_path):
    """Its runtime would say STARTING for ever."""
    with running(tmp_path) as gate:
        Path(f"{gate.log}.starts").touch()  # so long the next runtime is starting, with a child for a worker
        with contextlib.suppress(httpx.HTTPError):
            gate.predict("exit", headers={"prefer": "respond-async"})
        gate.wait_for(lambda: (found := gate.runtimes()) and children(found[0]))
        time.sleep(0.3)
        assert gate.health()["gate"]["restarts"] == 1
        Path(f"{gate.log}.starts").unlink()
        os.kill(children(gate.runtimes()[0])[0], signal.SIGKILL)
        gate.wait_for(lambda: gate.health()["status"] == "READY")
        assert gate.health()["gate"]["restarts"] == 2


def test_a_stopped_worker_ends_with_the_server(tmp_path):
    with running(tmp_path) as gate:
        Path(f"{gate.log}.starts").touch()
        os.kill(gate.runtimes()[0], signal.SIGKILL)
        gate.wait_for(lambda: (found := gate.runtimes()) and children(found[0]))
        worker = psutil.Process(children(gate.runtimes()[0])[0])
        worker.suspend()
        gate.process.send_signal(signal.SIGTERM)
        assert gate.process.wait(timeout=15) == 0
        psutil.wait_procs([worker], timeout=5)
        assert not worker.is_running()


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def test_a_set_up_that_fails_after_a_death_is_tried_again(tmp_path):
    with running(tmp_path) as gate:
        fails = Path(f"{gate.log}.fails")
        fails.touch()
        with contextlib.suppress(httpx.HTTPError):
            gate.predict("exit", headers={"prefer": "respond-async"})
        gate.wait_for(lambda: gate.health()["gate"]["restarts"] == 1)
        fails.unlink()
        gate.wait_for(lambda: gate.health()["status"] == "READY")
        assert gate.predict("x").status_code == 200


def test_a_set_up_that_fails_at_first_stays_so_and_says_it(tmp_path):
    Path(tmp_path / "asked.txt.fails").touch()
    with contextlib.closing(RunningGate(tmp_path, 1, {}, {}, until="SETUP_FAILED")) as gate:
        time.sleep(0.5)
        assert (gate.health()["status"], gate.health()["gate"]["restarts"]) == ("SETUP_FAILED", 0)
        assert gate.stop() == 0


def test_an_id_that_was_used_waits_its_turn_as_any_other(tmp_path):
    with running(tmp_path, slots=1) as gate, ThreadPoolExecutor(2) as pool:
        path = f"{gate.url}/predictions/mine"
        assert httpx.put(path, json={"input": {"prompt": "x"}}).status_code == 200
        task = pool.submit(gate.predict, "sleep 0.5")
        gate.wait_for(lambda: gate.asked()[-1] == "sleep 0.5")
        assert httpx.put(path, json={"input": {"prompt": "y"}}).status_code == 200
        assert task.result(timeout=0.3).status_code == 200, "answered before, if not yet read"


@contextlib.contextmanager
def waiting_in_line(gate: RunningGate, pool: ThreadPoolExecutor, id: str, **options) -> Iterator[Future]:
    """A prediction with this id behind one that runs, which has its answer at the end of the block."""
    running_one = pool.submit(gate.predict, "sleep 2 first")
    gate.wait_for(lambda: gate.asked()[-1:] == ["sleep 2 first"])
    body = {"input": {"prompt": f"waiting {id}"}, **options.pop("body", {})}
    waiting = pool.submit(gate.client.put, f"/predictions/{id}", json=body, **options)
    gate.wait_for(lambda: gate.health()["gate"]["waiting"] == 1)
    yield waiting
    assert running_one.result().status_code == 200


EVENTS = {"accept": "text/event-stream"}


@pytest.mark.parametrize(
    ("headers", "status", "form"),
    [
        pytest.param({}, 200, "{}", marks=pytest.mark.slow),
        ({"prefer": "respond-async"}, 202, "{}"),
        (EVENTS, 200, "event: completed\ndata: {}\n\n"),
    ],
)
@pytest.mark.fast_rows(1)
def test_what_waits_can_be_canceled(tmp_path, headers, status, form):
    canceled = {"id": "c", "logs": "", "metrics": {}, "status": "canceled"}
    with running(tmp_path, slots=1) as gate, ThreadPoolExecutor(2) as pool:
        with waiting_in_line(gate, pool, "c", headers=headers) as waiting:
            reply = gate.client.post("/predictions/c/cancel")
            assert (reply.status_code, reply.json()) == (200, {})
            answer = waiting.result()
            assert (answer.status_code, answer.text) == (status, form.format(json.dumps(canceled)))
            assert gate.health()["gate"]["waiting"] == 0
        assert gate.predict("next").status_code == 200
        assert gate.asked() == ["sleep 2 first", "next"]


def test_what_waits_for_a_runtime_that_died_can_be_canceled(tmp_path):
    with running(tmp_path, slots=1) as gate, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(gate.client.put, "/predictions/c", json={"input": {"prompt": "sleep 20"}}, timeout=9)
        gate.wait_for(lambda: gate.asked() == ["sleep 20"])
        os.kill(gate.runtimes()[0], signal.SIGKILL)
        gate.wait_for(lambda: gate.health()["status"] == "STARTING")
        assert gate.client.post("/predictions/c/cancel").status_code == 200
        assert asking.result().json()["status"] == "canceled"


@pytest.mark.parametrize(
    ("events", "tells"),
    [pytest.param(None, True, marks=pytest.mark.slow), (["start", "completed"], True), (["start"], False)],
)
@pytest.mark.fast_rows(1)
def test_the_webhook_of_what_was_canceled_in_line_hears_of_it(tmp_path, events, tells):
    told = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if len(told) > 1 else 500)  # asked again
            self.end_headers()

        def log_message(self, *arguments) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Hook) as hook,
        ThreadPoolExecutor(2) as pool,
        contextlib.ExitStack() as at_end,
    ):
        threading.Thread(target=hook.serve_forever, args=(0.02,), daemon=True).start()
        at_end.callback(hook.shutdown)  # else it goes round and round over a closed socket while this process lives
        address = f"http://127.0.0.1:{hook.server_port}/"
        body = {"webhook": address, **({} if events is None else {"webhook_events_filter": events})}
        with running(tmp_path, slots=1, webhooks=[address]) as gate:
            with waiting_in_line(gate, pool, "c", body=body) as waiting:
                assert gate.client.post("/predictions/c/cancel").status_code == 200
                assert waiting.result().json()["status"] == "canceled"
            if tells:
                gate.wait_for(lambda: len(told) == 2)
    assert told == [{"id": "c", "logs": "", "metrics": {}, "status": "canceled"}] * (2 if tells else 0)


def test_a_second_put_is_the_same_prediction(tmp_path):
    """While it waits by the gate's word, while it runs by the runtime's; who wants its events waits for them."""
    given = {"prompt": "sleep 0.6 c"}
    with running(tmp_path, slots=1) as gate, ThreadPoolExecutor(3) as pool:
        path = "/predictions/c"
        with waiting_in_line(gate, pool, "c", body={"input": given}) as waiting:
            state = gate.client.put(path, json={"input": {"prompt": "other"}})
            assert state.status_code == 202
            assert state.json() == {"id": "c", "input": given, "logs": "", "metrics": {}, "status": "starting"}
            following = pool.submit(gate.client.put, path, json={"input": {"prompt": "other"}}, headers=EVENTS)
            time.sleep(0.1)
            assert not following.done()
        assert following.result().json() == {"id": "c", "status": "processing"}
        assert gate.client.put(path, json={"input": {"prompt": "other"}}).json() == {"id": "c", "status": "processing"}
        assert waiting.result().json()["got"] == {"input": given}
        assert gate.asked() == ["sleep 2 first", "sleep 0.6 c"]


def test_all_requests_share_the_memory_for_their_bodies():
    memory = Memory(100)
    with memory.held() as first, memory.held() as second:
        first.set(60)
        second.set(40)
        with pytest.raises(Refused, match="too many requests"):
            second.set(41)
        first.set(10)
        second.set(90)
    assert memory.num_bytes == 0


@pytest.mark.slow
def test_a_runtime_that_keeps_dying_is_given_up(tmp_path):
    """And who still waits is told."""
    with running(tmp_path) as gate, ThreadPoolExecutor(3) as pool:
        for death in range(3):
            gate.wait_for(lambda death=death: gate.health()["gate"]["restarts"] == death)
            gate.wait_for(lambda: gate.health()["status"] == "READY")
            waiting = pool.submit(gate.predict, f"sleep {9 * death}")
            gate.wait_for(lambda death=death: gate.asked()[-1:] == [f"sleep {9 * death}"])
            with contextlib.suppress(httpx.HTTPError):
                gate.predict("exit", headers={"prefer": "respond-async"})  # else it is asked twice
        reply = waiting.result()
        assert (reply.status_code, reply.json()) == (503, {"detail": "the server was ended"})
        assert gate.process.wait(timeout=15) == 1
        gate.reader.join()
        assert "error: the runtime died 3 times within 60 s; its log is above\n" in gate.output


def test_a_killed_gate_leaves_no_runtime(tmp_path):
    with running(tmp_path) as gate:
        assert len(gate.runtimes()) == 1
        gate.process.send_signal(signal.SIGKILL)
        gate.process.wait()
        gate.wait_for(lambda: gate.runtimes() == [], seconds=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.fast_rows(1)
def test_a_stop_lets_open_requests_end(tmp_path, number):
    with running(tmp_path) as gate, ThreadPoolExecutor(2) as pool:
        task = pool.submit(gate.predict, "sleep 1")
        stream = pool.submit(gate.predict, "stream 20")
        gate.wait_for(lambda: set(gate.asked()) == {"sleep 1", "stream 20"})
        gate.process.send_signal(number)
        assert gate.process.wait(timeout=15) == 0
        assert stream.result().text.endswith("data: 19\n\n")
        assert task.result().json()["status"] == "succeeded"

"""Behaves as Cog's runtime towards the gate, without a model: slots, 409, health, and deaths on demand.

`python -m tests.deploy.gate.fake_runtime LOG --host HOST`, with PORT and SLOTS in the environment. The prompt says what
to do: `sleep S`, `stream N`, `flood N` (pieces of 1 KiB without a pause), `die` (the worker does: UNHEALTHY and 409 for
ever), `crash-once` (so it dies once, and the answer says it as Cog's does; `crash-once events` as an event), `exit`,
`exit-once`, `half` (its answer breaks off), `background S` (answered at once), `lose` (its slot is never free again),
`lose quietly` (and the health report does not show it), `linger S` (goes on when its client has left).
Each prediction's prompt goes into LOG. Where a file LOG.fails is there at the start, the set-up fails; where LOG.starts
is, it is STARTING for ever, with a child; while a file
LOG.garbled is there, the health report is no text.
"""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler

from tests.deploy.gate.answering import AnsweringHandler, AnsweringServer

SLOTS = threading.Semaphore(int(os.environ["SLOTS"]))
RUNNING: set[str] = set()
TAKEN: list[str] = []  # paths of what holds a slot without an open request
STATE = {"status": "SETUP_FAILED" if os.path.exists(sys.argv[1] + ".fails") else "READY"}  # noqa: PTH110
if os.path.exists(sys.argv[1] + ".starts"):  # noqa: PTH110
    STATE["status"] = "STARTING"
    subprocess.Popen(["sleep", "60"])


class Handler(AnsweringHandler, BaseHTTPRequestHandler):  # the second for ruff: do_GET is its word
    def do_GET(self) -> None:
        if os.path.exists(sys.argv[1] + ".garbled"):  # noqa: PTH110
            self.send_response(200)
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"\xff")
            return
        is_busy = STATE["status"] == "READY" and len(TAKEN) == int(os.environ["SLOTS"])
        health = {**STATE, "status": "BUSY"} if is_busy else STATE
        health = {**health, "setup": {"logs": "at /a/folder"}}
        self.reply(200, health if self.path == "/health-check" else {"path": self.path})

    def do_PUT(self) -> None:
        if self.path in RUNNING:
            self.rfile.read(int(self.headers["Content-Length"]))
            return self.reply(202, {"id": self.path.rpartition("/")[2], "status": "processing"})
        return self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path.endswith("/cancel"):
            note("cancel")
            self.reply(200, {})
        elif not isinstance(body["input"], dict):
            self.reply(422, {"detail": "no input"})
        elif STATE["status"] != "READY" or not SLOTS.acquire(blocking=False):
            self.reply(409, {"error": "At capacity"})
        else:
            RUNNING.add(self.path)
            try:
                keeps_slot = self.predict(body)
            except BaseException:
                self.end()
                raise
            if not keeps_slot:
                self.end()

    def end(self) -> None:
        RUNNING.discard(self.path)
        SLOTS.release()

    def predict(self, body: dict) -> bool:
        """Answer; whether the slot is kept beyond that."""
        prompt = body["input"]["prompt"]
        note(prompt)
        what, _, value = prompt.partition(" ")
        if what == "sleep":
            self.reply_while_connected(float(value.split()[0]), body)
        elif what == "stream":
            self.stream(int(value))
        elif what == "flood":
            self.stream(int(value), b"x" * 1024, pause_s=0)
        elif what == "background":
            TAKEN.append(self.path)
            threading.Timer(float(value), self.end_in_background).start()
            self.reply(202, {"id": self.path.rpartition("/")[2], "status": "starting"})
        elif what == "linger":
            time.sleep(float(value))
        elif what == "lose":
            RUNNING.discard(self.path)
            TAKEN.extend([] if value == "quietly" else [self.path])
            self.reply(200, {"status": "failed"})
        elif what == "exit" or (what == "exit-once" and asked().count(prompt) == 1):
            os._exit(9)
        elif what == "crash-once" and asked().count(prompt) == 1:
            STATE.update(status="UNHEALTHY", user_healthcheck_error="Healthcheck error: channel closed")
            failed = {"error": "Worker crashed", "id": "p", "status": "failed"}
            if value:
                self.begin_events()
                self.send_chunk(
                    b"event: completed\ndata: " + json.dumps(failed, separators=(",", ":")).encode() + b"\n\n"
                )
                self.send_chunk(b"")
            else:
                self.reply(200, failed)
        elif what == "half":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 50)
            os._exit(9)
        else:
            if what == "die":
                STATE.update(status="UNHEALTHY", user_healthcheck_error="Healthcheck error: channel closed")
            self.reply(200, {"status": "failed" if what == "die" else "succeeded", "got": body})
        return what in ("background", "lose")

    def reply_while_connected(self, seconds: float, body: dict) -> None:
        """Answer after some time; the log gets `gone` where the client leaves before."""
        end = time.monotonic() + seconds
        self.connection.settimeout(0.02)
        while time.monotonic() < end:
            try:
                if self.connection.recv(1) == b"":
                    self.note_gone()
                    return
            except TimeoutError:
                pass
        self.connection.settimeout(None)
        self.reply(200, {"status": "succeeded", "got": body})

    def end_in_background(self) -> None:
        TAKEN.remove(self.path)
        self.end()

    def stream(self, count: int, padding: bytes = b"", *, pause_s: float = 0.05) -> None:
        """Answer piece by piece; the log gets `gone` where the client leaves before the end."""
        self.begin_events()
        try:
            for number in range(count):
                self.send_chunk(f"event: output\ndata: {number}".encode() + padding + b"\n\n")
                time.sleep(pause_s)
            self.send_chunk(b"")
        except OSError:
            self.note_gone()

    def note_gone(self) -> None:
        note("gone")
        self.close_connection = True


def note(line: str) -> None:
    with open(sys.argv[1], "a") as log:
        log.write(f"{line}\n")


def asked() -> list[str]:
    with open(sys.argv[1]) as log:
        return log.read().splitlines()


if __name__ == "__main__":
    AnsweringServer((sys.argv[sys.argv.index("--host") + 1], int(os.environ["PORT"])), Handler).serve_forever()

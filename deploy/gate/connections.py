"""What one client's connection may cost: bounds that the HTTP server beneath has not."""

import asyncio
import contextlib
import errno
import json
import math
import resource
import socket
import sys
import time
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_MOST_CONNECTIONS = 4096
_MOST_UNFINISHED = 1024  # of them, whose next request is not there whole
_MOST_HEAD_BYTES, _MOST_HEADERS = 16 << 10, 100
_HEAD_S = 20.0  # for a request's head to arrive, or the first one's first byte
_IDLE_S = 65.0  # after an answer: longer than clients keep a connection, so that none meets one that is being closed
_LEFT_S = 1.0  # for a refused client to read why
_READING_S = 60.0  # for a client to take what is ready for it, about twice the next
# What one client may leave unread before its answer waits for it, and all together. Until then an answer is made at its
# own pace, and its place is free for others once it is made, not once it is read.
_UNREAD_BYTES, _MOST_UNREAD_BYTES = 4 << 20, 256 << 20
_READ_BYTES = 48 << 10  # and what the kernel has for it, within `_READING_S`
_SEND_BYTES = 1 << 17  # the kernel would take megabytes, and who reads slowly be taken for one who does not read
_SAID_AGAIN_S = 60.0
_FILES = 2 * _MOST_CONNECTIONS + 512  # each may have one to the runtime, too


class Requests(h11.Connection):
    """What comes over a connection, and goes back; `refused` is what was wrong with it.

    The server beneath bounds a head only while it is incomplete.
    """

    refused: h11.RemoteProtocolError | None = None
    _sends_chunks = False

    def send(self, event: Any) -> bytes | None:
        """What to write for an event. A stream's pieces are coded here: h11 takes several times as long."""
        if self._sends_chunks and type(event) is h11.Data:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        output = super().send(event)
        self._sends_chunks = isinstance(event, h11.Response) and b"\r\ntransfer-encoding: chunked" in output.lower()
        return output

    def next_event(self) -> Any:
        """The next event, as h11 gives it. Raises h11.RemoteProtocolError."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_head(event)
            return event
        except h11.RemoteProtocolError as error:
            self.refused = error
            raise


def _check_head(request: h11.Request) -> None:
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    names = [name for name, _ in request.headers]
    if size > _MOST_HEAD_BYTES or len(names) > _MOST_HEADERS:
        raise h11.RemoteProtocolError("large", error_status_hint=431)
    if b"content-length" in names and b"transfer-encoding" in names:  # others may go by the one or the other
        raise h11.RemoteProtocolError("a request has a Content-Length or a Transfer-Encoding, not both")


class Connection(H11Protocol):
    """One client's.

    Whoever sends slowly takes the place of such clients alone: of too many unfinished ones the oldest is closed, which
    a client that sends at once hardly ever is.
    """

    unfinished: dict["Connection", None] = {}  # noqa: RUF012  of this process, the oldest first
    _head_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = Requests(h11.SERVER, _MOST_HEAD_BYTES)
        self.timeout_keep_alive = _IDLE_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        # asyncio does it for sockets whose protocol was named alone. Without it a piece waits, up to 40 ms, for the
        # client's word that the one before has come.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.unfinished.pop(self, None)
        _stop(self._head_timer)
        _stop(self._reading_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.refused is not None:
            return
        if self._head_timer is None and self in self.unfinished and self._has_answered():
            self._head_timer = self.loop.call_later(_HEAD_S, self.transport.abort)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            unread = sum(other.transport.get_write_buffer_size() for other in self.connections)
            most = _UNREAD_BYTES if unread < _MOST_UNREAD_BYTES else 2 * _READ_BYTES
            self.transport.set_write_buffer_limits(high=most, low=most - _READ_BYTES)
        if self.conn.refused is None and self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
            if not self.cycle.more_body:
                self.unfinished.pop(self, None)

    def on_response_complete(self) -> None:
        self._wait_for_request()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what came, and take nothing more. The client may still be sending: it reads this first."""
        if self.cycle is not None and not self.cycle.response_complete:  # its body is what was wrong
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # within an answer
            self.transport.abort()
            return
        refused = self.conn.refused
        status, text = (refused.error_status_hint, str(refused)) if refused else (400, msg)
        if status == 431:
            text = f"a request's head may have {_MOST_HEAD_BYTES >> 10} KiB and {_MOST_HEADERS} headers"
        content = json.dumps({"detail": text}).encode()
        head = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        response = h11.Response(status_code=status, headers=head, reason=HTTPStatus(status).phrase.encode())
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.write_eof()
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(_LEFT_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_timer = self.loop.call_later(_READING_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._reading_timer)

    def _wait_for_request(self) -> None:
        """Until its head is there, and the answer before it, if any, is taken.

        Between two requests the server beneath closes the connection, after `_IDLE_S`.
        """
        self.unfinished.pop(self, None)
        self.unfinished[self] = None
        if len(self.unfinished) > _MOST_UNFINISHED:
            oldest = next(iter(self.unfinished))
            del self.unfinished[oldest]  # it is lost a moment later, and the next one closes another
            oldest.transport.abort()
        self._stop_head_timer()
        if self.transport.get_write_buffer_size():
            self._wait_for_reader()
        elif not self._has_answered() or self.conn.their_state is not h11.DONE or self.conn.trailing_data[0]:
            self._head_timer = self.loop.call_later(_HEAD_S, self.transport.abort)

    def _wait_for_reader(self) -> None:
        """Of what is left of an answer, as long as the client goes on taking it."""
        left = self.transport.get_write_buffer_size()

        def look_again() -> None:
            if left - self.transport.get_write_buffer_size() < min(left, _READ_BYTES):
                self.transport.abort()
            else:
                self._wait_for_reader()

        self._head_timer = self.loop.call_later(_READING_S, look_again) if left else None

    def _has_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _stop_head_timer(self) -> None:
        _stop(self._head_timer)
        self._head_timer = None


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def say_when_files_run_out(loop: asyncio.AbstractEventLoop) -> None:
    """Once a minute: asyncio logs a traceback for each connection that it cannot take, thousands a second."""
    said_at = -math.inf

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said_at
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - said_at > _SAID_AGAIN_S:
            said_at = time.monotonic()
            print("new connections wait: this process may open no more files (ulimit -n)", file=sys.stderr, flush=True)

    loop.set_exception_handler(handle)


def allow_files() -> None:
    """Let this process have a file for each connection, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

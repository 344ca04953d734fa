"""What one client's connection may cost: bounds that the HTTP server beneath has not."""

import asyncio
import contextlib
import resource
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

_MOST_CONNECTIONS = 4096
_MOST_UNFINISHED = 1024  # of them, whose next request is not there whole
_HEAD_S = 20.0  # for a request's head to arrive; without a byte of it the server beneath closes 5 s after an answer
_READING_S = 60.0  # for a client to take what is ready for it, about twice the next
_SEND_BYTES = 1 << 17  # the kernel would take megabytes, and who reads slowly be taken for one who does not read
_FILES = 2 * _MOST_CONNECTIONS + 512  # each may have one to the runtime, too


class Connection(H11Protocol):
    """One client's.

    Whoever sends slowly takes the place of such clients alone: of too many unfinished ones the oldest is closed, which
    a client that sends at once hardly ever is.
    """

    unfinished: dict["Connection", None] = {}  # noqa: RUF012  of this process, the oldest first
    _head_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        self._wait_for_request()
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        elif len(self.unfinished) > _MOST_UNFINISHED:
            oldest = next(iter(self.unfinished))
            del self.unfinished[oldest]  # it is lost a moment later, and the next newcomer closes another
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.unfinished.pop(self, None)
        _stop(self._head_timer)
        _stop(self._reading_timer)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self._head_timer)
            if not self.cycle.more_body:
                self.unfinished.pop(self, None)

    def on_response_complete(self) -> None:
        self._wait_for_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_timer = self.loop.call_later(_READING_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._reading_timer)

    def _wait_for_request(self) -> None:
        """Until its head is there, and the answer before it, if any, is taken."""
        self.unfinished.pop(self, None)
        self.unfinished[self] = None
        _stop(self._head_timer)
        is_read = self.transport.get_write_buffer_size() == 0
        self._head_timer = self.loop.call_later(_HEAD_S if is_read else _READING_S, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def allow_files() -> None:
    """Let this process have a file for each connection, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

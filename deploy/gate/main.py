"""Runs gate and runtime together until one of them ends."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn

from deploy.gate.app import Gate
from deploy.gate.connections import Connection, allow_files
from deploy.gate.rules import Rules
from deploy.gate.runtime import GivenUp, Runtime


def serve(command: Sequence[str], environment: dict[str, str], rules: Rules, *, host: str, port: int) -> int:
    """Serve until SIGTERM, SIGINT, SIGHUP or the runtime's end; open requests are finished first. Returns the status.

    command: starts the runtime, but for its address. Prints `serving on http://HOST:PORT` once clients may come.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn heeds them first, and then raises them again
        signal.signal(number, lambda number, frame: None)
    allow_files()
    with _listen(host, port) as listener:
        return asyncio.run(_serve(Runtime(command, environment), rules, listener, environment))


async def _serve(runtime: Runtime, rules: Rules, listener: socket.socket, environment: dict[str, str]) -> int:
    concurrency, token = int(environment["COG_MAX_CONCURRENCY"]), environment.get("WEBHOOK_AUTH_TOKEN")
    gate = Gate(runtime, rules, concurrency=concurrency, webhook_token=token)
    config = uvicorn.Config(
        gate, http=Connection, ws="none", lifespan="off", access_log=False, log_level="warning", server_header=False
    )
    server = uvicorn.Server(config)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, setattr, server, "should_exit", True)
    host, port = listener.getsockname()[:2]
    print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    keeping = asyncio.ensure_future(runtime.keep_running())
    watching = asyncio.ensure_future(gate.watch())
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await asyncio.wait({keeping, serving}, return_when=asyncio.FIRST_COMPLETED)
    watching.cancel()
    if keeping.done():
        server.force_exit = server.should_exit = True
        await serving
        try:
            keeping.result()
        except GivenUp as given_up:
            print(f"error: {given_up}", file=sys.stderr, flush=True)
            return given_up.status
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)

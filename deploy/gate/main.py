"""Runs gate and runtime together until one of them ends."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn

from deploy.gate.app import Gate
from deploy.gate.bodies import give_large_ones_back
from deploy.gate.companion import Companion
from deploy.gate.connections import Connection, allow_files, say_when_files_run_out
from deploy.gate.rules import Rules
from deploy.gate.runtime import GivenUp, Runtime
from deploy.listening import listen, show_address


def serve(
    command: Sequence[str],
    environment: dict[str, str],
    rules: Rules,
    *,
    host: str,
    port: int,
    companion: Sequence[str] = (),
) -> int:
    """Serve until SIGTERM, SIGINT, SIGHUP or the runtime's end; open requests are finished first. Returns the status.

    command: starts the runtime, but for its address. companion: starts another program that is to run beside the gate
    and asks it, but for the gate's address; its end is the gate's, too. Prints `serving on http://HOST:PORT` once
    clients may come.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn heeds them first, and then raises them again
        signal.signal(number, lambda number, frame: None)
    allow_files()
    give_large_ones_back()
    with listen(host, port) as listener:
        beside = Companion(companion, environment)
        return asyncio.run(_serve(Runtime(command, environment), rules, listener, environment, beside))


async def _serve(
    runtime: Runtime, rules: Rules, listener: socket.socket, environment: dict[str, str], companion: Companion
) -> int:
    concurrency, token = int(environment["COG_MAX_CONCURRENCY"]), environment.get("WEBHOOK_AUTH_TOKEN")
    gate = Gate(runtime, rules, concurrency=concurrency, webhook_token=token)
    config = uvicorn.Config(
        gate, http=Connection, ws="none", lifespan="off", access_log=False, log_level="warning", server_header=False
    )
    server = uvicorn.Server(config)
    say_when_files_run_out(asyncio.get_running_loop())
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, setattr, server, "should_exit", True)
    host, port = listener.getsockname()[:2]
    print(f"serving on {show_address(host, port)}", flush=True)
    keeping = asyncio.ensure_future(runtime.keep_running())
    watching = asyncio.ensure_future(gate.watch())
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await companion.start(host, port)
    beside = asyncio.ensure_future(companion.ends())
    await asyncio.wait({keeping, serving, beside}, return_when=asyncio.FIRST_COMPLETED)
    watching.cancel()
    has_failed = beside.done()
    server.should_exit, server.force_exit = True, keeping.done()
    await serving
    await companion.stop()
    beside.cancel()
    if keeping.done():
        try:
            keeping.result()
        except GivenUp as given_up:
            print(f"error: {given_up}", file=sys.stderr, flush=True)
            return given_up.status
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
    if has_failed:
        print("error: the program beside the gate ended; what it said is above", file=sys.stderr, flush=True)
    return int(has_failed)

"""python -m web.openai: OpenAI's API for running servers, of which each serves the same model."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

from alpaca.errors import InputError, MissingInput, MissingPackage, run_command
from alpaca.files.network.addresses import split_list
from deploy.listening import listen, port, show_address

TOKEN_VARIABLE = "ALPACA_SERVER_TOKEN"
_MOST_RUNNING = 64  # as a server has it that is started without --concurrency


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings; what no flag gives comes from the environment of the server that was started beside."""
    parser = argparse.ArgumentParser(
        prog="python -m web.openai",
        description="OpenAI's API, in front of servers started with script/serve.",
        epilog=f"{TOKEN_VARIABLE} is sent to the targets as a bearer token, where they want one.",
    )
    parser.add_argument(
        "--target", action="append", required=True, metavar="URL", help="a server; several serve the same model"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--model_name", default="alpaca", help="what clients call the model (default: %(default)s)")
    parser.add_argument(
        "--adapters",
        default=os.environ.get("ALPACA_ADAPTERS", ""),
        help="names of the servers' adapters, which clients take as models: name,name2 or name=folder,name2=folder2 "
        "[ALPACA_ADAPTERS]",
    )
    parser.add_argument(
        "--api_keys_file", type=Path, metavar="F", help="one key a line, of which a client must send one "
        "(default: those of ALPACA_API_KEYS, if any)"
    )  # fmt: skip
    parser.add_argument(
        "--max_waiting", type=int, default=256, metavar="N",
        help="predictions in line before others get 429 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--concurrency", type=int, default=int(os.environ.get("COG_MAX_CONCURRENCY") or _MOST_RUNNING), metavar="N",
        help="predictions at one target at once [COG_MAX_CONCURRENCY] (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--allowed_hosts",
        default=os.environ.get("ALPACA_ALLOWED_HOSTS", ""),
        help="names under which clients reach this endpoint, beside localhost and addresses in numbers "
        "[ALPACA_ALLOWED_HOSTS]",
    )
    return parser.parse_args(arguments)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys in a file, else in the environment. Raises MissingInput, InputError."""
    if file is None:
        return split_list(os.environ.get("ALPACA_API_KEYS", ""))
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise MissingInput(f"--api_keys_file {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--api_keys_file {file}: expected text, one key a line") from None
    keys = tuple(filter(None, map(str.strip, lines)))
    if not keys:
        raise InputError(f"--api_keys_file {file}: there is no key in it")
    return keys


def main() -> None:
    options = parse_arguments()
    if options.max_waiting < 0 or options.concurrency < 1:
        raise InputError("--max_waiting must be at least 0, and --concurrency at least 1")
    try:
        import prometheus_client  # noqa: F401  said here, before anything else is read
    except ModuleNotFoundError as error:
        raise MissingPackage(f"{error}; this endpoint needs an extra: pip install --group endpoint") from None
    keys = read_keys(options.api_keys_file)
    with listen(options.host, options.port) as listening:
        print(f"OpenAI's API on {show_address(options.host, listening.getsockname()[1])}/v1", flush=True)
        asyncio.run(serve(options, keys, listening))


async def serve(options: argparse.Namespace, keys: tuple[str, ...], listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; open requests are finished first."""
    import uvicorn

    from deploy.gate.connections import Connection, allow_files, say_when_files_run_out
    from deploy.gate.rules import Rules
    from web.openai.app import Endpoint
    from web.openai.inputs import Models
    from web.openai.metrics import Metrics
    from web.openai.targets import Target, Targets

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn heeds them first, and then raises them again
        signal.signal(number, lambda number, frame: None)
    allow_files()
    say_when_files_run_out(asyncio.get_running_loop())
    token = os.environ.get(TOKEN_VARIABLE)
    targets = Targets(
        [Target(url, token=token) for url in options.target],
        most_running=options.concurrency,
        most_waiting=options.max_waiting,
    )
    adapters = tuple(pair.partition("=")[0].strip() for pair in split_list(options.adapters))
    rules = Rules(hosts=split_list(options.allowed_hosts), keys=keys)
    app = Endpoint(targets, Models(base=options.model_name, adapters=adapters), rules, Metrics(targets))
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=Connection, ws="none", lifespan="off", access_log=False, log_level="warning", server_header=False
        )
    )
    watching = asyncio.ensure_future(targets.keep_watched())
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    await asyncio.wait({watching, serving}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


if __name__ == "__main__":
    run_command(main)

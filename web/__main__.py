"""python -m web: the page for a running server.

It listens on this machine alone unless --host says otherwise; whoever reaches it can use the server through it.
"""

import argparse
import os
import socket
import sys

from alpaca.errors import InputError, MissingPackage, run_command

TOKEN_VARIABLE = "ALPACA_SERVER_TOKEN"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m web",
        description="A page in the browser for a server started with script/serve.",
        epilog=f"{TOKEN_VARIABLE} is sent as a bearer token, where a proxy in front of the server wants one.",
    )
    parser.add_argument("--target", default="http://127.0.0.1:5000", help="the server (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=7860, help="0 picks a free one (default: %(default)s)")
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, found {text!r}")
    return int(text)


def listen(host: str, port: int) -> socket.socket:
    """The page's socket, at which connections wait from now on.

    Raises InputError, naming the other choice, when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        advice = "--port 0 picks a free one" if port else "is --host an address of this machine?"
        raise InputError(f"cannot listen on {host} port {port} ({error.strerror or error}); {advice}") from None
    return listening


def main() -> None:
    options = parse_arguments()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    try:
        from web.app import build_app, serve
    except ModuleNotFoundError as error:
        raise MissingPackage(f"{error}; the page needs an extra: pip install --group web") from None
    from web.client import Server, is_loopback

    server = Server(options.target, token=os.environ.get(TOKEN_VARIABLE))
    app = build_app(server)
    with listen(options.host, options.port) as listening:
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"page for {server.name}: http://{host}:{listening.getsockname()[1]}", flush=True)
        if not is_loopback(options.host):
            print("it is open to other machines: whoever reaches it can use the server", file=sys.stderr, flush=True)
        serve(app, listening)


if __name__ == "__main__":
    run_command(main)

"""python -m web: the page for a running server.

It listens on this machine alone unless --host says otherwise; whoever reaches it can use the server through it.
"""

import argparse
import os
import sys

from alpaca.errors import MissingPackage, run_command
from deploy.listening import listen, port, show_address

TOKEN_VARIABLE = "ALPACA_SERVER_TOKEN"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m web",
        description="A page in the browser for a server started with script/serve.",
        epilog=f"{TOKEN_VARIABLE} is sent as a bearer token, where a proxy in front of the server wants one.",
    )
    parser.add_argument("--target", default="http://127.0.0.1:5000", help="the server (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=port, default=7860, help="0 picks a free one (default: %(default)s)")
    return parser.parse_args(arguments)


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
        print(f"page for {server.name}: {show_address(options.host, listening.getsockname()[1])}", flush=True)
        if not is_loopback(options.host):
            print("it is open to other machines: whoever reaches it can use the server", file=sys.stderr, flush=True)
        serve(app, listening)


if __name__ == "__main__":
    run_command(main)

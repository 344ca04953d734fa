"""Where a program listens."""

import argparse
import socket

from alpaca.errors import InputError


def port(text: str) -> int:
    """A port as a flag has it."""
    if not text.isdigit() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, found {text!r}")
    return int(text)


def listen(host: str, port: int) -> socket.socket:
    """A socket at which connections wait from now on.

    Raises InputError, naming the other choice, when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:  # an address of the one kind opens none of the other
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        advice = "--port 0 picks a free one" if port else "is --host an address of this machine?"
        raise InputError(f"cannot listen on {host} port {port} ({error.strerror or error}); {advice}") from None
    return listening


def show_address(host: str, port: int) -> str:
    """The address that clients use."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

"""Messages through a pipe, between a server and a process that it asks."""

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

_SIZE_BYTES = 8  # a message begins with its length


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message, or None at the stream's end."""
    head = stream.read(_SIZE_BYTES)
    if len(head) < _SIZE_BYTES:
        return None
    body = stream.read(size := int.from_bytes(head, "big"))
    return json.loads(body) if len(body) == size else None


def write_message(stream: BinaryIO, message: Mapping[str, Any]) -> None:
    """Send a message. Raises OSError where nobody reads."""
    body = json.dumps(message).encode()
    stream.write(len(body).to_bytes(_SIZE_BYTES, "big") + body)
    stream.flush()

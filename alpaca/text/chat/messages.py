"""The messages of a conversation, as a client sends them, checked."""

import re
from collections.abc import Sequence
from typing import Any

from alpaca.errors import InputError
from alpaca.files.names import quote_name, quote_value

MOST_MESSAGES = 2048
MOST_CHARACTERS = 1 << 22  # of all contents together
MOST_PARTS = 256  # of one content
_KEYS = {"role", "content"}
_ROLE = re.compile(r"[\w.-]{1,64}")
Message = dict[str, Any]  # role: a name; content: a text, or a list of {"type": "text", "text": …}


def check_messages(messages: Sequence[Any]) -> None:
    """Check form and size, before anything is spent on them. Raises InputError, which names the message."""
    if len(messages) > MOST_MESSAGES:
        raise InputError(f"messages may hold {MOST_MESSAGES:,} messages; found {len(messages):,}")
    room = MOST_CHARACTERS
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict) or not message.keys() >= _KEYS:
            raise InputError(f"{name} must be an object with `role` and `content`; found {quote_value(message)}")
        if more := sorted(map(str, message.keys() - _KEYS)):
            raise InputError(f"{name} has {quote_name(more[0])}: a message has a role and a content, and nothing else")
        _check_role(name, message["role"])
        _check_content(name, message["content"])
        room -= sum(map(len, texts_of(message)))
        if room < 0:
            raise InputError(f"the contents of messages may have {MOST_CHARACTERS:,} characters together")


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content: one, or those of its parts."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def with_texts(message: Message, texts: Sequence[str]) -> Message:
    """The message with other texts in its content, as many as `texts_of` gives."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": texts[0]}
    return {**message, "content": [{**part, "text": text} for part, text in zip(content, texts, strict=True)]}


def joined(message: Message) -> Message:
    """The message with the texts of its parts as one."""
    return {**message, "content": "".join(texts_of(message))}


def _check_role(name: str, role: Any) -> None:
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InputError(
            f"{name}: expected role to be a name such as user, assistant or system: 1 to 64 letters, digits, `_`, `-` "
            f"or `.`; found {quote_value(role)}"
        )


def _check_content(name: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InputError(f"{name}: expected content to be a text or a list of text parts; found {quote_value(content)}")
    if len(content) > MOST_PARTS:
        raise InputError(f"{name}: a content may have {MOST_PARTS} parts; found {len(content):,}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise InputError(f"{name}: this server takes texts alone; found a part of type {quote_value(kind)}")
        if kind is None or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise InputError(
                f'{name}: expected a part to be {{"type": "text", "text": "…"}}; found {quote_value(part)}'
            )

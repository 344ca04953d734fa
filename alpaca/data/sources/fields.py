"""Fields of records, read and checked, with errors that name the record and the field."""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.data.sources.json_text import WrittenNumber
from alpaca.data.sources.notes import Notes
from alpaca.errors import InputError

_ANSWERS = ("output", "completion", "content", "value", "chosen", "rejected")  # fields whose scalars become text


class MissingField(InputError):
    """A record lacks a field.    field: its name."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def read_text(record: Mapping[str, Any], name: str, where: str, notes: Notes) -> str:
    if name not in record:
        raise MissingField(f"{where}: the field {name!r} is missing, found {list_fields(record)}; add it", name)
    value = record[name]
    if isinstance(value, int | float) and name in _ANSWERS and math.isfinite(value):  # bool is an int
        notes.scalars += 1
        return value.text if isinstance(value, WrittenNumber) else json.dumps(value)
    if not isinstance(value, str):
        raise InputError(f"{where}, field {name!r}: expected text, found {shown(value)}; mend or remove the record")
    return valid_text(value, f"{where}, field {name!r}")


def valid_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, no tokenizer can read it
        raise InputError(f"{where}: expected valid Unicode text, found {error}; mend it") from error
    return text


def note_ignored(record: Mapping[str, Any], read: Sequence[str], notes: Notes, *, within: str = "") -> None:
    for name in record.keys() - set(read):
        if record[name] not in (None, "", []):
            notes.ignored[f"{within} {name or '(without a name)'}".strip()] += 1


def list_fields(record: Mapping[str, Any]) -> str:
    return f"the fields {reprlib.repr(list(record))}"


def shown(value: object) -> str:
    kind = "float" if isinstance(value, float) else type(value).__name__
    return f"{kind} {reprlib.repr(value)}"

"""What an answer may be made of: a JSON schema, a regular expression or a grammar, within bounds. Decides alone.

The bounds come before any work on what a client sent: nothing here recurses, and a schema that is too large is not even
written out.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alpaca.errors import InputError
from alpaca.files.names import quote_value
from alpaca.serving.structured.numbers import settle_numbers

MOST_SCHEMA_CHARACTERS = 1 << 16
MOST_SCHEMA_DEPTH = 64
MOST_REGEX_CHARACTERS = 1 << 13
MOST_GRAMMAR_CHARACTERS = 1 << 15

Kind = Literal["json_schema", "regex", "grammar"]
_LIMITS: dict[str, int] = {"regex": MOST_REGEX_CHARACTERS, "grammar": MOST_GRAMMAR_CHARACTERS}


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """text: the schema as JSON, its keys in the client's order, or the expression or grammar as it was sent."""

    kind: Kind
    text: str


def read_constraint(json_schema: Any, regex: str, grammar: str) -> Constraint | None:
    """The constraint that a request asks for, None where it asks for none. Raises InputError."""
    texts = {"regex": regex, "grammar": grammar}
    given = [name for name, text in texts.items() if text]
    if json_schema is not None:
        given.insert(0, "json_schema")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} do not go together: an answer follows one of them")
    if not given:
        return None
    kind: Any = given[0]
    text = _write_schema(json_schema) if kind == "json_schema" else texts[kind]
    most = _LIMITS.get(kind, MOST_SCHEMA_CHARACTERS)
    if len(text) > most:
        raise InputError(f"{kind} may have {most:,} characters; found {len(text):,}")
    if "\0" in text:
        raise InputError(f"{kind} holds a NUL character: leave it out")
    return Constraint(kind=kind, text=text)


def _write_schema(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        raise InputError(f"json_schema must be an object; found {quote_value(schema)}")
    _check_size(schema)
    try:
        own = json.loads(_dump(schema))
    except (TypeError, ValueError) as error:
        raise InputError(f"json_schema cannot be written as JSON: {error}") from None
    settle_numbers(own)
    return _dump(own)


def _dump(schema: Any) -> str:
    return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _check_size(schema: Mapping[str, Any]) -> None:
    """Refuse what is too deep or too large, without reading more of it than shows that."""
    room = MOST_SCHEMA_CHARACTERS
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MOST_SCHEMA_DEPTH:
            raise InputError(f"json_schema may be nested {MOST_SCHEMA_DEPTH} deep; found more: use $ref and $defs")
        if isinstance(value, Mapping | list):
            room -= len(value)
        for part, size in _parts(value) if room >= 0 else ((None, 1),):
            room -= size
            if room < 0:
                raise InputError(f"json_schema may have {MOST_SCHEMA_CHARACTERS:,} characters; found more")
            waiting.append((part, depth + 1 if isinstance(part, Mapping | list) else depth))


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """What a value holds, each with about as many characters as it adds itself."""
    if isinstance(value, Mapping):
        yield from ((part, len(str(key)) + _own_size(part)) for key, part in value.items())
    elif isinstance(value, list):
        yield from ((part, _own_size(part)) for part in value)


def _own_size(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0

"""A schema's numbers: which can be followed exactly. Bounds are drawn in to such, others refused: answers validate.

llguidance reads numbers as doubles, by one product or quotient with a power of ten: the result is the nearest double
where both factors are doubles themselves. Its text is then the shortest one, which is the client's.
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from alpaca.errors import InputError

LARGEST_WHOLE = 1 << 53
_LARGEST_EXPONENT = 22  # 10**22 is the last power of ten that is a double
_BOUNDS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}  # and the side that they close
_VALUES = ("const", "enum", "multipleOf")
_ANNOTATIONS = ("default", "example", "examples")  # nothing has to follow these
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # names, not keywords


def settle_numbers(schema: dict[str, Any]) -> None:
    """Draw bounds in to what can be followed. Raises InputError with the place of a number that cannot.

    A bound that leaves more than ±2**53 open, as that of 64 bits, becomes ±2**53: whatever keeps to it keeps to both.
    """
    waiting: list[tuple[str, str, Any]] = [("schema", "#", schema)]
    while waiting:
        role, place, value = waiting.pop()
        if role == "value" and not is_exact(value):
            raise InputError(
                f"json_schema at {place}: the number {str(value)[:60]} cannot be followed exactly: take one within "
                "±2**53 of 15 digits at most, leave the bound out, or have it sent as a string"
            )
        if role == "schema" and isinstance(value, dict):
            _draw_bounds_in(value)
        for key, part in _parts(value):
            if part_role := _role(role, key):
                waiting.append((part_role, f"{place}/{_escape(key)}", part))


def _draw_bounds_in(schema: dict[str, Any]) -> None:
    for key in _BOUNDS.keys() & schema.keys():
        sign, value = _BOUNDS[key], schema[key]
        if isinstance(value, int | float) and not isinstance(value, bool) and sign * value > LARGEST_WHOLE:
            schema[key] = sign * LARGEST_WHOLE


def is_exact(value: Any) -> bool:
    """Whether a value is no number, or one that llguidance reads and writes without a change."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    if not abs(value) <= LARGEST_WHOLE:  # NaN is neither
        return False
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)  # infinities and NaN are refused above
    return int("".join(map(str, digits))) <= LARGEST_WHOLE and abs(exponent) <= _LARGEST_EXPONENT


def _role(role: str, key: str) -> str:
    """What a part is: a schema, names with schemas, a value whose numbers count; empty for what does not count."""
    if role != "schema":
        return "value" if role == "value" else "schema"
    if key in _BOUNDS or key in _VALUES:
        return "value"
    return "" if key in _ANNOTATIONS else "names" if key in _NAMED else "schema"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list):
        yield from ((str(index), part) for index, part in enumerate(value))


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")

"""Records of JSON text: a list, one record a line, columns, or an object of splits."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from alpaca.errors import InputError

_SPLIT = "train"
_OTHER_SPLITS = ("validation", "valid", "val", "dev", "test", "eval")
_WRAPPERS = ("data", "examples", "rows", "records")  # of which one alone holds the records
_COLUMN_TYPES = "features"  # beside the rows that the hub's data viewer gives
Placed = tuple[str, object]  # words for where a record stands, and the record


class WrittenNumber(float):
    """A number with a point or an exponent, and how it is written.    text: such as 1.50."""

    def __init__(self, text: str) -> None:
        self.text = text


_DECODER = json.JSONDecoder(parse_float=WrittenNumber)


def json_records(text: str, path: object) -> Iterator[Placed]:
    """Yield (place, record) of a text that starts with `[` or `{`. Raises InputError."""
    if text.lstrip().startswith("["):
        whole = _parse(text, f"{path}: expected a JSON list of records")
        return _listed(whole, path)
    lines = _lines_of(text)
    if len(lines) == 1 or not _is_json(lines[0][1]):
        return _object_records(text, path, one_line=len(lines) == 1)
    return _line_records(lines, path)


def json_texts(text: str, path: object) -> Iterator[Placed]:
    """Yield (place, text) of JSON texts, one a line. Raises InputError."""
    return _line_records(_lines_of(text), path)


def _lines_of(text: str) -> list[tuple[int, str]]:
    """The lines that are not empty, numbered from 1; a byte order mark is left of files that were put together."""
    lines = enumerate(re.split("\r\n|\r|\n", text), start=1)  # not splitlines, which also cuts at U+2028, inside texts
    return [(number, line.lstrip("\ufeff")) for number, line in lines if line.strip("\ufeff \t")]


def _listed(records: list[object], path: object) -> Iterator[Placed]:
    return ((f"{path}, record {index} (counted from 0)", record) for index, record in enumerate(records))


def _line_records(lines: list[tuple[int, str]], path: object) -> Iterator[Placed]:
    for index, (number, line) in enumerate(lines):
        expected = f"{path}, line {number}: expected a whole record on each line (or one JSON list over the whole file)"
        yield f"{path}, record {index} (counted from 0, line {number})", _parse(line, expected)


def _object_records(text: str, path: object, *, one_line: bool) -> Iterator[Placed]:
    """Of one object over the whole file: splits, columns, or, on one line, the only record."""
    try:
        whole = _parse(text, f"{path}: expected a JSON list of records, one record a line, columns, or splits")
    except InputError:
        if (several := _one_after_the_other(text)) is None:
            raise
        return _listed(several, path)
    found, where = _unwrap(whole, str(path))
    if isinstance(found, list):
        return _listed(found, where)
    if (rows := _rows_of_columns(found)) is not None:
        return _listed(rows, where)
    if _are_unequal_columns(found):
        raise InputError(
            f"{where}: expected columns of equal length, found "
            + ", ".join(f"{name}: {len(column):,}" for name, column in found.items())
        )
    if not one_line and found is whole and not _looks_like_record(found):
        raise InputError(
            f"{path}: expected a JSON list of records, one record a line, columns of equal length, or an object of "
            f"splits with {_SPLIT!r}; found an object with {reprlib.repr(list(found))}"
        )
    return _listed([found], where)


def _one_after_the_other(text: str) -> list[object] | None:
    """Objects without anything between them, as jq writes them; None where it is something else."""
    found: list[object] = []
    end, text = 0, text.strip()
    try:
        while end < len(text):
            record, end = _DECODER.raw_decode(text, end)
            found.append(record)
            while text[end : end + 1].isspace():
                end += 1
    except (ValueError, RecursionError):
        return None
    return found


def _are_unequal_columns(found: Mapping[str, Any]) -> bool:
    columns = list(found.values())
    if not all(isinstance(column, list) and not _is_turns(column) for column in columns):
        return False
    return len({len(column) for column in columns}) > 1


def _looks_like_record(found: Mapping[str, Any]) -> bool:
    return any(isinstance(value, str) for value in found.values()) or "messages" in found or "conversations" in found


def _unwrap(found: Any, where: str) -> tuple[Any, str]:
    """The records of an object that holds them under the name of a split or the like, and where they stand."""
    if not isinstance(found, Mapping):
        return found, where
    if isinstance(found.get(_SPLIT), list | Mapping):
        return found[_SPLIT], f"{where}, split {_SPLIT!r}"
    if splits := [name for name in _OTHER_SPLITS if isinstance(found.get(name), list | Mapping)]:
        raise InputError(
            f"{where}: found the splits {', '.join(splits)} and no {_SPLIT!r}; give a file that has one, or the split "
            "alone as a list"
        )
    for name in _WRAPPERS:
        if isinstance(found.get(name), list) and not any(
            isinstance(value, list) for key, value in found.items() if key not in (name, _COLUMN_TYPES)
        ):
            return [_row(record) for record in found[name]], f"{where}, {name!r}"
    return found, where


def _row(record: object) -> object:
    """A record as the hub's data viewer gives it: under `row`, beside its number."""
    if isinstance(record, Mapping) and isinstance(record.get("row"), Mapping) and "row_idx" in record:
        return record["row"]
    return record


def _rows_of_columns(columns: Any) -> list[dict[str, object]] | None:
    """The rows of columns: lists of equal length, or objects with the same keys (as pandas writes them)."""
    values = list(columns.values()) if isinstance(columns, Mapping) else []
    if values and all(isinstance(column, Mapping) for column in values):
        if any(column.keys() != values[0].keys() for column in values):
            return None
        values = [list(column.values()) for column in values]
    if not values or not all(isinstance(column, list) for column in values):
        return None
    if len({len(column) for column in values}) > 1 or _is_turns(values[0]):
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _is_turns(column: list[object]) -> bool:
    """Whether a list is one conversation and not a column of them."""
    return bool(column) and all(isinstance(turn, Mapping) and ({"role", "from"} & turn.keys()) for turn in column)


# Parsing ----------------------------------------------------------------------------------------------------------


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        # a line that begins a record and is damaged is still a line of records
        return bool(re.match(r'\s*\{\s*"[^"]*"\s*:\s*("|\d|true|false|null)', text)) and text.rstrip().endswith(
            ("}", "},")
        )
    return True


def _parse(text: str, expected: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{expected}, found invalid JSON: {error}{_how_to_mend(text, error.pos)}") from error
    except (ValueError, RecursionError) as error:  # thousands of nested brackets raise RecursionError
        raise InputError(f"{expected}, found invalid JSON: {error}") from error


def _how_to_mend(text: str, position: int) -> str:
    """What to do about the faults that people make by hand; "" for all others."""
    before, after = text[:position].rstrip(), text[position:].lstrip()
    if after.startswith(("//", "/*", "#")):
        return "; JSON has no comments: remove this one"
    if text[position : position + 1] in ("\n", "\r", "\t"):
        return "; inside a text a line feed is written \\n, and a tabulator \\t"
    if before.endswith(",") and after[:1] in ("]", "}"):
        place = _line_and_column(text, len(before) - 1)
    elif after.startswith(",") and after[1:].lstrip()[:1] in ("]", "}", ""):  # Python 3.13 points at the comma itself
        place = _line_and_column(text, len(text) - len(after))
    elif after.startswith("'"):
        return "; JSON's texts and names stand in double quotes: this looks like Python's own notation"
    elif before.endswith("}") and after.startswith("{"):
        return "; between two records of a list there must be a comma"
    else:
        return ""
    closing = "the end" if not after.lstrip(",").strip() else "the closing bracket"
    return f"; remove the comma before {closing}, at {place}"


def _line_and_column(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line} column {position - text.rfind(chr(10), 0, position)}"

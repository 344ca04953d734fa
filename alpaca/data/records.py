"""Instruction examples as records: read from a file or a data set and checked one by one.

Nothing here needs torch, whose import takes most of the time of a short command.
"""

import json
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alpaca.errors import BadExamples, InputError, MissingInput, MissingPackage
from alpaca.files.reading import list_folder

_FIELDS = ("instruction", "input", "output")
_DATASET_ID = re.compile(r"(?!.*\.jsonl?$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction, its answer, and the context it may refer to ("" for none)."""

    instruction: str
    output: str
    input: str = ""


def read_examples(data_path: str | Path) -> list[Example]:
    """Read the examples of a JSON list, a JSON-lines file, or a Hugging Face data set such as "tatsu-lab/alpaca".

    A path that exists is read as a file, and the file's content decides of which kind it is. A record needs the texts
    `instruction` and `output`; `input` may be missing or null, which counts as ""; further fields are ignored. Raises
    MissingInput, MissingPackage, and BadExamples that names the record and the field.
    """
    try:
        examples = [check_record(record, where) for where, record in read_records(data_path)]
    except InputError as error:
        raise BadExamples(str(error)) from error
    if not examples:
        raise BadExamples(f"{data_path} holds no examples; expected at least one record with {', '.join(_FIELDS)}")
    return examples


def read_records(data_path: str | Path) -> Iterator[tuple[str, object]]:
    """Yield (place, record) for each record, unchecked, for reports that go on past a bad one.

    place: words for messages that say where the record stands. Raises MissingInput, MissingPackage, and InputError for
    a file that holds no records.
    """
    path = Path(data_path)
    if path.exists():
        return _file_records(path)
    if _DATASET_ID.fullmatch(str(data_path)):
        return _dataset_records(str(data_path))
    raise MissingInput(
        f"no data at {path} (found in {path.parent}: {list_folder(path.parent)}); expected a JSON or "
        'JSON-lines file, or a Hugging Face data set such as "tatsu-lab/alpaca"'
    )


def _file_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (place, record) for each record of a file."""
    text = _read_text(path)
    first = text.lstrip()[:1]
    if first == "[":
        for index, record in enumerate(_parse_json(text, f"{path}: expected a JSON list of records")):
            yield f"{path}, record {index} (counted from 0)", record
    elif first == "{":
        yield from _line_records(path, text)
    elif first:
        raise InputError(
            f"{path}: expected a JSON list of records, or one record a line; found text that starts {_shown(text)}"
        )


def _line_records(path: Path, text: str) -> Iterator[tuple[str, object]]:
    lines = enumerate(text.split("\n"), start=1)  # splitlines would also cut at U+2028 and the like, inside texts
    filled = ((number, line) for number, line in lines if line.strip())
    for index, (number, line) in enumerate(filled):
        expected = f"{path}, line {number}: expected a whole record on each line (or one JSON list over the whole file)"
        yield f"{path}, record {index} (counted from 0, line {number})", _parse_json(line, expected)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read as a file ({error.strerror}); give a JSON or JSON-lines file"
        ) from error


def _parse_json(text: str, expected: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # thousands of nested brackets raise RecursionError
        raise InputError(f"{expected}, found invalid JSON: {error}") from error


def _dataset_records(name: str) -> Iterator[tuple[str, object]]:
    """Yield (place, record) for each record of a Hugging Face data set's `train` split."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackage(
            f"no file {name} here, and to load it as a Hugging Face data set the package `datasets` is needed: "
            "pip install 'datasets>=4'"
        ) from error
    try:
        records = load_dataset(name, split="train")
    except Exception as error:  # hub, network, cache and data errors have no common class
        raise MissingInput(
            f"no file {name} here, and the Hugging Face data set {name} cannot be loaded "
            f"({type(error).__name__}: {error}); check the name and the network, or give a downloaded JSON file"
        ) from error
    for index, record in enumerate(records):
        yield f"{name}, record {index} (counted from 0)", record


def check_record(record: object, where: str) -> Example:
    """Make an Example of a record. Raises InputError, naming the record and the field, where a text is missing."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object with the fields {', '.join(_FIELDS)}, found {_shown(record)}")
    given = [field for field in _FIELDS if field != "input" or record.get("input") is not None]
    return Example(**{field: _check_text(record, field, where) for field in given})


def _check_text(record: dict[str, object], field: str, where: str) -> str:
    if field not in record:
        raise InputError(
            f"{where}: the field {field!r} is missing, found the fields {reprlib.repr(list(record))}; add it"
        )
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{where}, field {field!r}: expected text, found {_shown(text)}; mend or remove the record")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, no tokenizer can read it
        raise InputError(f"{where}, field {field!r}: expected valid Unicode text, found {error}; mend it") from error
    return text


def _shown(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"

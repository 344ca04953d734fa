"""Examples of a file or a data set: opened, its format recognised, and each record checked.

Nothing here needs torch, whose import takes most of the time of a short command.
"""

import re
import reprlib
from collections.abc import Iterator
from pathlib import Path

from alpaca.data.example import AnyExample, Judged, Pair
from alpaca.data.sources.formats import FORMATS, RESPONSE_MARK, RecordReader, recognise
from alpaca.data.sources.json_text import Placed, json_records, json_texts
from alpaca.data.sources.notes import Notes
from alpaca.data.sources.opening import MOST_BYTES, as_text, read_bytes
from alpaca.data.sources.tables import (
    csv_records,
    hub_records,
    is_saved_dataset,
    is_table,
    looks_like_csv,
    saved_records,
    table_records,
)
from alpaca.errors import BadExamples, InputError, MissingInput
from alpaca.files.reading import list_folder

AUTO = "auto"
DATA_FORMATS = (AUTO, *(known.name for known in FORMATS))
_COLUMNS = frozenset(name for known in FORMATS for name in known.fields)
_DATASET_ID = re.compile(
    r"(?!.*\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zst)$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII
)


def read_data(
    data_path: str | Path,
    *,
    data_format: str = AUTO,
    response_mark: str = RESPONSE_MARK,
    most_bytes: int = MOST_BYTES,
) -> tuple[list[AnyExample], RecordReader]:
    """Read all examples of a file or a data set, of any format of `DATA_FORMATS` that has one answer for each prompt.

    Returns also what they were read by. Raises as `read_any_data` does, and BadExamples for data that compares answers.
    """
    examples, reader = read_any_data(
        data_path, data_format=data_format, response_mark=response_mark, most_bytes=most_bytes
    )
    if reader.format.judges:
        raise BadExamples(f"{data_path}: {one_answer_expected(reader)}")
    return examples, reader  # type: ignore[return-value]


def one_answer_expected(reader: RecordReader) -> str:
    """What to say where data that compares answers cannot be used."""
    known = {"pairs": "--objective dpo, orpo or kto", "labels": "--objective kto"}[reader.format.judges]
    return (
        f"expected one answer for each prompt, found {reader.format.title} ({reader.format.expected}). train.py takes "
        f"them with {known}; --data_format alpaca or prompt_completion reads a single field of answers (output, "
        "completion) and passes over the rest"
    )


def read_any_data(
    data_path: str | Path,
    *,
    data_format: str = AUTO,
    response_mark: str = RESPONSE_MARK,
    most_bytes: int = MOST_BYTES,
) -> tuple[list[AnyExample | Pair | Judged], RecordReader]:
    """Read all examples of a file or a data set, of any format of `DATA_FORMATS`; and what they were read by.

    A path that exists is read as a file, and the file's content decides of which kind it is: JSON (a list, lines,
    columns, splits), CSV or TSV, Parquet or Arrow, each perhaps packed. Raises MissingInput,
    MissingPackage, and BadExamples that names the record and the field.
    """
    try:
        records = list(read_records(data_path, most_bytes=most_bytes))
        reader = make_reader(records, data_format=data_format, response_mark=response_mark)
        examples = [reader.convert(record, where) for where, record in records]
    except InputError as error:
        raise BadExamples(str(error)) from error
    if not examples:
        raise BadExamples(f"{data_path} holds no examples; expected at least one record with {FORMATS[0].expected}")
    return examples, reader


def read_examples(data_path: str | Path) -> list[AnyExample]:
    """The examples of `read_data`, of the format that is recognised."""
    return read_data(data_path)[0]


def make_reader(records: list[Placed], *, data_format: str = AUTO, response_mark: str = RESPONSE_MARK) -> RecordReader:
    """What makes examples of these records: by the format that is asked for, or by the one that they have."""
    named = {known.name: known for known in FORMATS}
    found = recognise(record for _, record in records) if data_format == AUTO else named[data_format]
    return RecordReader(found, Notes(), response_mark)


def read_records(data_path: str | Path, *, most_bytes: int = MOST_BYTES) -> Iterator[Placed]:
    """Yield (place, record) for each record, unchecked, for reports that go on past a bad one.

    place: words for messages that say where the record stands. Raises MissingInput, MissingPackage, and InputError for
    a file that holds no records.
    """
    path = Path(data_path)
    if path.is_dir() and is_saved_dataset(path):
        return saved_records(path)
    if path.exists():
        return _file_records(path, most_bytes)
    if _DATASET_ID.fullmatch(str(data_path)):
        return hub_records(str(data_path))
    raise MissingInput(
        f"no data at {path} (found in {path.parent}: {list_folder(path.parent)}); expected a JSON or "
        'JSON-lines file, CSV, Parquet, or a Hugging Face data set such as "tatsu-lab/alpaca"'
    )


def _file_records(path: Path, most_bytes: int) -> Iterator[Placed]:
    """Yield (place, record) for each record of a file."""
    content = read_bytes(path, most_bytes=most_bytes)
    if is_table(content):
        _refuse_packed(path)
        return table_records(content, path)
    text = as_text(content, path).lstrip("\ufeff")  # of files that were put together
    first = text.lstrip()[:1]
    if not first:
        return iter(())
    if first in "[{":
        return json_records(text, path)
    if looks_like_csv(text, _COLUMNS):
        return csv_records(text, path)
    if first == '"':
        return json_texts(text, path)
    raise InputError(
        f"{path}: expected a JSON list of records, one record a line, or a table whose first line names columns such "
        f"as instruction and output; found text that starts {type(text).__name__} {reprlib.repr(text)}"
    )


def _refuse_packed(path: Path) -> None:
    """Raise InputError for a table inside another packed file; whoever looks at a file's first bytes then knows it."""
    with open(path, "rb") as file:
        if not is_table(file.read(8)):
            raise InputError(f"{path} is a packed Parquet or Arrow file, which is packed in itself; unpack it first")

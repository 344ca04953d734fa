"""Records of tables: CSV and TSV, Parquet and Arrow, and data sets of the hub or of a folder."""

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpaca.data.sources.json_text import Placed
from alpaca.errors import InputError, MissingInput, MissingPackage

_SPLIT = "train"
_DELIMITERS = "\t,;"
INSTALL = "pip install 'datasets>=4'"  # brings pyarrow


def looks_like_csv(text: str, columns: frozenset[str]) -> bool:
    """Whether the first line names at least one of these columns between delimiters, or alone."""
    return bool(columns & set(_header(text)[0]))


def csv_records(text: str, path: object) -> Iterator[Placed]:
    """Yield (place, record) of a CSV or TSV text, whose first line names its columns. Raises InputError."""
    text = text.lstrip("\r\n")
    names, delimiter = _header(text)
    if twice := [name for number, name in enumerate(names) if name and name in names[:number]]:
        raise InputError(f"{path}: the first line names the column {twice[0]!r} twice; remove one")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may be longer than csv's 128 KiB
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    next(rows)
    index = 0
    try:
        for row in rows:
            if not row:
                continue
            where = f"{path}, record {index} (counted from 0, up to line {rows.line_num})"
            if len(row) != len(names):
                raise InputError(
                    f"{where}: expected {len(names)} fields ({', '.join(names)}), found {len(row)}; a text with "
                    f"{delimiter!r} or a line feed must stand in double quotes"
                )
            yield where, {name: _value(name, value) for name, value in zip(names, row, strict=True)}
            index += 1
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}; quote the field, and double quotes in it") from error


def _header(text: str) -> tuple[list[str], str]:
    """The names of the first line, and the delimiter that gives the most."""
    line = re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    best: tuple[list[str], str] = ([], ",")
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        if len(names) > len(best[0]):
            best = [name.strip() for name in names], delimiter
    return best


def _value(name: str, value: str) -> object:
    """A field's text; turns, which a table can only hold as JSON, as what they are."""
    if name in ("messages", "conversations", "conversation") and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


# pyarrow ------------------------------------------------------------------------------------------------------------


def table_records(content: bytes, path: object) -> Iterator[Placed]:
    """Yield (place, record) of a Parquet file, or an Arrow file or stream. Raises InputError, MissingPackage."""
    arrow = _import_arrow(path)
    source = arrow.BufferReader(content)
    try:
        if content.startswith(b"PAR1"):
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(source).iter_batches()
        elif content.startswith(b"ARROW1"):
            reader = arrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = arrow.ipc.open_stream(source)
        index = itertools.count()
        for batch in batches:
            for record in batch.to_pylist():
                yield f"{path}, record {next(index)} (counted from 0)", record
    except arrow.ArrowException as error:
        raise InputError(f"{path} is damaged or only a part of a file ({error}); copy it again") from error


def is_table(content: bytes) -> bool:
    """Whether a file is Parquet or Arrow, by its first bytes."""
    return content.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"))


def _import_arrow(path: object) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise MissingPackage(f"{path} is a Parquet or Arrow file, and reading it needs pyarrow: {INSTALL}") from error
    return pyarrow


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of the package datasets writes."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_records(folder: Path) -> Iterator[Placed]:
    """Yield (place, record) of a folder that `save_to_disk` wrote; of several splits, `train`."""
    datasets = _import_datasets(f"{folder} is a data set that `save_to_disk` wrote, and to read it")
    try:
        found = datasets.load_from_disk(str(folder))
        records = found[_SPLIT] if isinstance(found, datasets.DatasetDict) else found
    except Exception as error:  # its errors have no common class
        raise InputError(f"{folder} cannot be read as a saved data set ({type(error).__name__}: {error})") from error
    return _placed(records, folder)


def hub_records(name: str) -> Iterator[Placed]:
    """Yield (place, record) of a Hugging Face data set's `train` split. Raises MissingInput, MissingPackage."""
    datasets = _import_datasets(f"no file {name} here, and to load it as a Hugging Face data set")
    try:
        records = datasets.load_dataset(name, split=_SPLIT)
    except Exception as error:  # hub, network, cache and data errors have no common class
        raise MissingInput(
            f"no file {name} here, and the Hugging Face data set {name} cannot be loaded "
            f"({type(error).__name__}: {error}); check the name and the network, or give a downloaded JSON file"
        ) from error
    return _placed(records, name)


def _placed(records: Any, name: object) -> Iterator[Placed]:
    return ((f"{name}, record {index} (counted from 0)", record) for index, record in enumerate(records))


def _import_datasets(what_for: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage(f"{what_for} the package `datasets` is needed: {INSTALL}") from error
    return datasets

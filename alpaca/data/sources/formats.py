"""The formats of records: which one a data set has, and the example that a record of it stands for."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alpaca.data.example import AnyExample, Completion, Judged, Pair
from alpaca.data.sources.answers import ALPACA_FIELDS, COMPLETION_FIELDS, convert_alpaca, convert_completion
from alpaca.data.sources.fields import MissingField, shown, valid_text
from alpaca.data.sources.notes import Notes
from alpaca.data.sources.preferences import (
    LABELLED_FIELDS,
    PAIR_FIELDS,
    convert_labelled,
    convert_pair,
    is_labelled,
    is_pair,
)
from alpaca.data.sources.turns import TURN_FIELDS, TURNS_EXPECTED, are_turns, convert_conversation, keys_of_turns
from alpaca.errors import InputError

RESPONSE_MARK = "### Response:"
_LOOKED_AT = 100  # records, to see which format they have


@dataclass(frozen=True)
class DataFormat:
    """One form of records. fields: what such a record has.    expected: in words.    convert: makes the example.

    judges: "pairs" of a better and a worse answer, "labels" of good and bad ones, or "": one answer to learn.
    """

    name: str
    title: str
    expected: str
    fields: tuple[str, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any], str, Notes], AnyExample | Pair | Judged]
    judges: str = ""


@dataclass(frozen=True)
class RecordReader:
    """Makes examples of one data set's records.    response_mark: where in a plain text the answer begins, after it."""

    format: DataFormat
    notes: Notes
    response_mark: str = RESPONSE_MARK

    def lines(self) -> list[str]:
        """For a log: the format, and what was noted so far."""
        return [f"read as {self.format.title}: {self.format.expected}", *self.notes.lines()]

    def convert(self, record: object, where: str) -> AnyExample | Pair | Judged:
        """Raises InputError, naming the record and the field, and the nearest format where it is of another."""
        if self.format is TEXT:
            return _convert_text(record, where, self.response_mark, self.notes)
        if not isinstance(record, Mapping):
            hint = "; put the turns under 'messages'" if isinstance(record, list) and are_turns(record) else ""
            raise InputError(f"{where}: expected an object with {self.format.expected}, found {shown(record)}{hint}")
        try:
            return self.format.convert(record, where, self.notes)
        except InputError as error:
            text = f"{error}{_nearest(record, error.field)}" if isinstance(error, MissingField) else str(error)
            other = next((one for one in FORMATS if one.convert is not self.format.convert and one.fits(record)), None)
            if other is None or self.format.fits(record):
                raise InputError(text) from error
            raise InputError(
                f"{text} (this record looks like {other.title}, while the data is read as {self.format.title}: "
                f"--data_format {other.name} reads it as that. Put records of two formats into files of their own)"
            ) from error


def recognise(records: Iterable[object]) -> DataFormat:
    """The format that the first record of a known one has; Alpaca's, whose errors help, where there is none."""
    for record, _ in zip(records, range(_LOOKED_AT), strict=False):
        if isinstance(record, str):
            return TEXT
        if isinstance(record, Mapping):
            found = next((one for one in FORMATS if one.fits(record)), None)
            if found is not None:
                return found
    return ALPACA


# Plain text -------------------------------------------------------------------------------------------------------


def _convert_text(record: object, where: str, mark: str, notes: Notes) -> Completion:
    given = record.get("text") if isinstance(record, Mapping) else record
    if not isinstance(given, str):
        raise InputError(f"{where}: expected {TEXT.expected}, found {shown(record)}")
    text = valid_text(given, where)
    before, found, after = text.partition(mark)
    if not found:
        raise InputError(
            f"{where}: nothing says where the answer begins: expected {mark!r} in the text; name your own with "
            "--response_mark"
        )
    notes.several_marks += mark in after
    return Completion(before + found, after)


def _nearest(record: Mapping[str, Any], name: str) -> str:
    """What a reader of the error may have meant: a field of nearly that name, or the format that is nearest."""
    folded = {key.strip().lower(): key for key in record if isinstance(key, str)}
    near = difflib.get_close_matches(name, folded, n=1)
    if near:
        return f" (is it {folded[near[0]]!r}?)"
    if {"role", "content"} <= folded.keys() or {"from", "value"} <= folded.keys():
        return " (this is one turn: a record holds all turns of a conversation, under 'messages')"
    shared = [(len(set(known.fields) & record.keys()), known) for known in FORMATS]
    most, best = max(shared, key=lambda pair: pair[0])
    return f" (nearest of the known formats: {best.title}, {best.expected})" if most else f" ({_KNOWN})"


# The table ----------------------------------------------------------------------------------------------------------


def _has(record: Mapping[str, Any], *names: str) -> bool:
    """Whether a record of one answer has these fields."""
    return set(names) <= record.keys() and not is_pair(record) and not is_labelled(record)


ALPACA = DataFormat(
    "alpaca", "Alpaca's", "instruction, output and perhaps input", ALPACA_FIELDS,
    lambda record: _has(record, "instruction", "output"), convert_alpaca,
)  # fmt: skip
MESSAGES = DataFormat(
    "messages", "messages (OpenAI's)", TURNS_EXPECTED, ("messages",),
    lambda record: _has(record) and any(map(record.get, TURN_FIELDS)) and "from" not in keys_of_turns(record),
    convert_conversation,
)  # fmt: skip
SHAREGPT = DataFormat(
    "sharegpt", "ShareGPT's", "conversations, a list of turns with from and value", ("conversations", "conversation"),
    lambda record: _has(record) and "from" in keys_of_turns(record), convert_conversation,
)  # fmt: skip
PROMPT_COMPLETION = DataFormat(
    "prompt_completion", "prompt and completion", "prompt and completion", COMPLETION_FIELDS,
    lambda record: _has(record, "prompt", "completion"), convert_completion,
)  # fmt: skip
TEXT = DataFormat(
    "text", "plain text", "a text that holds a response mark", ("text",),
    lambda record: isinstance(record.get("text"), str) and _has(record) and "instruction" not in record,
    lambda record, where, notes: _convert_text(record, where, RESPONSE_MARK, notes),
)  # fmt: skip
PREFERENCE = DataFormat(
    "preference", "preferences", "a prompt (or an instruction), chosen and rejected", PAIR_FIELDS,
    is_pair, convert_pair, judges="pairs",
)  # fmt: skip
LABELLED = DataFormat(
    "labelled", "labelled answers", "prompt, completion and label (true or false)", LABELLED_FIELDS,
    is_labelled, convert_labelled, judges="labels",
)  # fmt: skip
FORMATS = (ALPACA, MESSAGES, SHAREGPT, PROMPT_COMPLETION, TEXT, PREFERENCE, LABELLED)
_KNOWN = "known formats: " + "; ".join(f"{known.name}: {known.expected}" for known in FORMATS)

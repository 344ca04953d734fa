"""The formats of records: which one a data set has, and the example that a record of it stands for."""

import difflib
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alpaca.data.example import AnyExample, Completion, Conversation, Example, Turn
from alpaca.errors import InputError

RESPONSE_MARK = "### Response:"
_LOOKED_AT = 100  # records, to see which format they have
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "bot": "assistant",
    "tool": "tool", "observation": "tool", "ipython": "tool", "function": "tool",
}  # fmt: skip
_ANSWERS = ("output", "completion", "content", "value")  # fields whose scalars become text


@dataclass
class Notes:
    """What was done to records on the way, counted for the log."""

    scalars: int = 0  # answers that were no text, such as 4 or true
    unanswered: int = 0  # conversations whose last turns nobody answers: these are left out
    ignored: Counter[str] = field(default_factory=Counter)  # fields that are not read, and in how many records

    def lines(self) -> list[str]:
        """For a log: a line for each thing that occurs."""
        lines = []
        if self.scalars:
            lines.append(f"{self.scalars:,} answers are numbers or the like; their JSON text is taken")
        if self.unanswered:
            lines.append(f"{self.unanswered:,} conversations end with turns that nobody answers; these are left out")
        if self.ignored:
            lines.append("fields that are not read: " + ", ".join(sorted(self.ignored)))
        return lines


@dataclass(frozen=True)
class DataFormat:
    """One form of records. fields: what such a record has.    expected: in words.    convert: makes the example."""

    name: str
    title: str
    expected: str
    fields: tuple[str, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any], str, Notes], AnyExample]


@dataclass(frozen=True)
class RecordReader:
    """Makes examples of one data set's records.    response_mark: where in a plain text the answer begins, after it."""

    format: DataFormat
    notes: Notes
    response_mark: str = RESPONSE_MARK

    def lines(self) -> list[str]:
        """For a log: the format, and what was noted so far."""
        return [f"read as {self.format.title}: {self.format.expected}", *self.notes.lines()]

    def convert(self, record: object, where: str) -> AnyExample:
        """Raises InputError, naming the record and the field, and the nearest format where it is of another."""
        if self.format is TEXT:
            return _convert_text(record, where, self.response_mark)
        if not isinstance(record, Mapping):
            raise InputError(f"{where}: expected an object with {self.format.expected}, found {_shown(record)}")
        try:
            return self.format.convert(record, where, self.notes)
        except InputError as error:
            other = next((one for one in FORMATS if one is not self.format and one.fits(record)), None)
            if other is None or self.format.fits(record):
                raise
            raise InputError(
                f"{error} (this record looks like {other.title}, while the data is read as {self.format.title}: "
                f"--data_format {other.name} reads it as that)"
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


# Alpaca -------------------------------------------------------------------------------------------------------------


def _convert_alpaca(record: Mapping[str, Any], where: str, notes: Notes) -> Example:
    _note_ignored(record, ALPACA, notes)
    context = "" if record.get("input") is None else _text(record, "input", where, notes)
    return Example(_text(record, "instruction", where, notes), _text(record, "output", where, notes), context)


# Conversations ------------------------------------------------------------------------------------------------------


def _turns_of(record: Mapping[str, Any]) -> tuple[str, Any]:
    """The field that holds a record's turns, and they; ("", None) without one."""
    for name in ("messages", "conversations", "conversation"):
        if isinstance(record.get(name), Sequence) and not isinstance(record[name], str):
            return name, record[name]
    return "", None


def _keys_of(record: Mapping[str, Any]) -> set[str]:
    turns = _turns_of(record)[1]
    return set(turns[0]) if turns and isinstance(turns[0], Mapping) else set()


def _convert_conversation(record: Mapping[str, Any], where: str, notes: Notes) -> Conversation:
    name, turns = _turns_of(record)
    if turns is None:
        raise InputError(f"{where}: expected {MESSAGES.expected}, found {_fields(record)}")
    read = [_read_turn(turn, f"{where}, {name}[{number}]", notes) for number, turn in enumerate(turns)]
    system = record.get("system")
    if isinstance(system, str) and system and not any(turn.role == "system" for turn in read):
        read.insert(0, Turn("system", system))
    return _make_conversation(read, f"{where}, field {name!r}", notes)


def _make_conversation(turns: list[Turn], where: str, notes: Notes) -> Conversation:
    answered = len(turns)
    while answered and turns[answered - 1].role != "assistant":
        answered -= 1
    if not any(turn.is_trained for turn in turns[:answered]):
        found = ", ".join(turn.role for turn in turns) or "nothing"
        raise InputError(f"{where}: expected at least one turn of the assistant to learn from, found turns of: {found}")
    while not turns[answered - 1].is_trained:
        answered -= 1
    notes.unanswered += answered < len(turns)
    for number, turn in enumerate(turns[:answered]):
        if turn.role == "system" and number:
            raise InputError(f"{where}: a system turn may only come first; turn {number} is one")
    return Conversation(tuple(turns[:answered]))


def _read_turn(turn: object, where: str, notes: Notes) -> Turn:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: expected a turn with role and content (or from and value), found {_shown(turn)}")
    role_field = "role" if "role" in turn else "from"
    content_field = "value" if "from" in turn and "content" not in turn else "content"
    if missing := [name for name in (role_field, content_field) if name not in turn]:
        raise InputError(f"{where}: the field {missing[0]!r} is missing, found {_fields(turn)}; add it")
    given = turn[role_field]
    role = _ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        near = difflib.get_close_matches(str(given).lower(), _ROLES, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise InputError(
            f"{where}, field {role_field!r}: expected user, assistant or system (human, gpt and the like), found "
            f"{_shown(given)}{hint}"
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise InputError(f"{where}: calls of tools are not trained on; found one. Leave the record out")
    if isinstance(turn[content_field], list):
        content = _text_of_parts(turn[content_field], f"{where}, field {content_field!r}")
    else:
        content = _text(turn, content_field, where, notes)
    return Turn(role, content, is_trained=role == "assistant" and turn.get("weight", 1) != 0)


def _text_of_parts(parts: list[object], where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: expected text, or parts of type text, found {_shown(part)}")
        texts.append(part["text"])
    return "".join(texts)


# Prompt and completion, plain text ----------------------------------------------------------------------------------


def _convert_completion(record: Mapping[str, Any], where: str, notes: Notes) -> Completion | Conversation:
    _note_ignored(record, PROMPT_COMPLETION, notes)
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Completion(_text(record, "prompt", where, notes), _text(record, "completion", where, notes))
    turns: list[Turn] = []
    for name, part in (("prompt", prompt), ("completion", completion)):
        if isinstance(part, str):
            part = [{"role": "user" if name == "prompt" else "assistant", "content": part}]
        if not isinstance(part, list):
            raise InputError(f"{where}, field {name!r}: expected a text or a list of messages, found {_shown(part)}")
        read = [_read_turn(turn, f"{where}, {name}[{number}]", notes) for number, turn in enumerate(part)]
        turns += [Turn(turn.role, turn.content, turn.is_trained and name == "completion") for turn in read]
    return _make_conversation(turns, where, notes)


def _convert_text(record: object, where: str, mark: str) -> Completion:
    given = record.get("text") if isinstance(record, Mapping) else record
    if not isinstance(given, str):
        raise InputError(f"{where}: expected {TEXT.expected}, found {_shown(record)}")
    text = _valid(given, where)
    before, found, after = text.partition(mark)
    if not found:
        raise InputError(
            f"{where}: nothing says where the answer begins: expected {mark!r} in the text; name your own with "
            "--response_mark"
        )
    return Completion(before + found, after)


# Fields -------------------------------------------------------------------------------------------------------------


def _text(record: Mapping[str, Any], name: str, where: str, notes: Notes) -> str:
    if name not in record:
        raise InputError(
            f"{where}: the field {name!r} is missing, found {_fields(record)}; add it{_nearest(record, name)}"
        )
    value = record[name]
    if isinstance(value, int | float) and name in _ANSWERS:  # bool is an int
        notes.scalars += 1
        return json.dumps(value)
    if not isinstance(value, str):
        raise InputError(f"{where}, field {name!r}: expected text, found {_shown(value)}; mend or remove the record")
    return _valid(value, f"{where}, field {name!r}")


def _valid(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, no tokenizer can read it
        raise InputError(f"{where}: expected valid Unicode text, found {error}; mend it") from error
    return text


def _nearest(record: Mapping[str, Any], name: str) -> str:
    """What a reader of the error may have meant: a field of nearly that name, or the format that is nearest."""
    near = difflib.get_close_matches(name, [key for key in record if isinstance(key, str)], n=1)
    if near:
        return f" (is it {near[0]!r}?)"
    shared = [(len(set(known.fields) & record.keys()), known) for known in FORMATS]
    most, best = max(shared, key=lambda pair: pair[0])
    return f" (nearest of the known formats: {best.title}, {best.expected})" if most else f" ({_KNOWN})"


def _note_ignored(record: Mapping[str, Any], read_as: DataFormat, notes: Notes) -> None:
    for name in record.keys() - set(read_as.fields):
        if record[name] not in (None, "", []):
            notes.ignored[str(name)] += 1


def _fields(record: Mapping[str, Any]) -> str:
    return f"the fields {reprlib.repr(list(record))}"


def _shown(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


# The table ----------------------------------------------------------------------------------------------------------

ALPACA = DataFormat(
    "alpaca", "Alpaca's", "instruction, output and perhaps input", ("instruction", "input", "output"),
    lambda record: {"instruction", "output"} <= record.keys(), _convert_alpaca,
)  # fmt: skip
MESSAGES = DataFormat(
    "messages", "messages (OpenAI's)", "messages, a list of turns with role and content", ("messages",),
    lambda record: _turns_of(record)[1] is not None and "from" not in _keys_of(record), _convert_conversation,
)  # fmt: skip
SHAREGPT = DataFormat(
    "sharegpt", "ShareGPT's", "conversations, a list of turns with from and value", ("conversations", "conversation"),
    lambda record: "from" in _keys_of(record), _convert_conversation,
)  # fmt: skip
PROMPT_COMPLETION = DataFormat(
    "prompt_completion", "prompt and completion", "prompt and completion", ("prompt", "completion"),
    lambda record: {"prompt", "completion"} <= record.keys(), _convert_completion,
)  # fmt: skip
TEXT = DataFormat(
    "text", "plain text", "a text that holds a response mark", ("text",),
    lambda record: isinstance(record.get("text"), str) and "instruction" not in record,
    lambda record, where, notes: _convert_text(record, where, RESPONSE_MARK),
)  # fmt: skip
FORMATS = (ALPACA, MESSAGES, SHAREGPT, PROMPT_COMPLETION, TEXT)
_KNOWN = "known formats: " + "; ".join(f"{known.name}: {known.expected}" for known in FORMATS)

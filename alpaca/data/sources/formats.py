"""The formats of records: which one a data set has, and the example that a record of it stands for."""

import difflib
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alpaca.data.example import AnyExample, Completion, Conversation, Example, Turn
from alpaca.data.sources.json_text import WrittenNumber
from alpaca.data.sources.notes import Notes
from alpaca.errors import InputError

RESPONSE_MARK = "### Response:"
_LOOKED_AT = 100  # records, to see which format they have
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant",
    "tool": "tool", "observation": "tool", "ipython": "tool", "function": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call", "tool_calls")  # fields of a turn, or its role in other programs' data
_LEARNT = ("weight", "train", "training")  # fields that say whether a turn is learnt: OpenAI's, and axolotl's
_TURNS = ("messages", "conversations", "conversation")  # fields of a record
_SYSTEM = ("system", "system_prompt")  # fields beside the turns
_ANSWERS = ("output", "completion", "content", "value")  # fields whose scalars become text


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
            return _convert_text(record, where, self.response_mark, self.notes)
        if not isinstance(record, Mapping):
            hint = "; put the turns under 'messages'" if isinstance(record, list) and _are_turns(record) else ""
            raise InputError(f"{where}: expected an object with {self.format.expected}, found {_shown(record)}{hint}")
        try:
            return self.format.convert(record, where, self.notes)
        except InputError as error:
            other = next((one for one in FORMATS if one.convert is not self.format.convert and one.fits(record)), None)
            if other is None or self.format.fits(record):
                raise
            raise InputError(
                f"{error} (this record looks like {other.title}, while the data is read as {self.format.title}: "
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


# Alpaca -------------------------------------------------------------------------------------------------------------


def _convert_alpaca(record: Mapping[str, Any], where: str, notes: Notes) -> Example:
    _note_ignored(record, ALPACA.fields, notes)
    given = record.get("input")
    has_none = given is None or (isinstance(given, float) and math.isnan(given))  # as pandas writes None
    context = "" if has_none else _text(record, "input", where, notes)
    return Example(_text(record, "instruction", where, notes), _text(record, "output", where, notes), context)


# Conversations ------------------------------------------------------------------------------------------------------


def _turns_of(record: Mapping[str, Any]) -> tuple[str, Any]:
    """The field that holds a record's turns, and they; ("", None) without one."""
    for name in _TURNS:
        if isinstance(record.get(name), Sequence) and not isinstance(record[name], str):
            return name, record[name]
    return "", None


def _are_turns(found: list[Any]) -> bool:
    return bool(found) and isinstance(found[0], Mapping) and bool({"role", "from"} & found[0].keys())


def _keys_of(record: Mapping[str, Any]) -> set[str]:
    turns = _turns_of(record)[1]
    return set(turns[0]) if turns and isinstance(turns[0], Mapping) else set()


def _convert_conversation(record: Mapping[str, Any], where: str, notes: Notes) -> Conversation:
    name, turns = _turns_of(record)
    if turns is None:
        for other in _TURNS:
            if record.get(other) is not None:
                raise InputError(
                    f"{where}, field {other!r}: expected a list of turns with role and content, found "
                    f"{_shown(record[other])}; write it as JSON does"
                )
        raise InputError(f"{where}: expected {MESSAGES.expected}, found {_fields(record)}")
    _note_ignored(record, (name, *_SYSTEM), notes)
    read = [_read_turn(turn, f"{where}, {name}[{number}]", notes) for number, turn in enumerate(turns)]
    for field in _SYSTEM:
        if record.get(field) and not any(turn.role == "system" for turn in read):
            read.insert(0, Turn("system", _text(record, field, where, notes)))
    return _make_conversation(read, f"{where}, field {name!r}", notes)


def _make_conversation(turns: list[Turn], where: str, notes: Notes) -> Conversation:
    answered = len(turns)
    while answered and turns[answered - 1].role != "assistant":
        answered -= 1
    if not any(turn.is_trained for turn in turns[:answered]):
        found = ", ".join(turn.role for turn in turns) or "nothing"
        without = " (all of weight 0)" if answered else ""
        raise InputError(
            f"{where}: expected at least one turn of the assistant to learn from, found turns of: {found}{without}; "
            "remove the record"
        )
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
    if any(turn.get(name) for name in _CALLS) or given in _CALLS:
        raise InputError(f"{where}: calls of tools are not trained on; found one. Leave the record out")
    role = _ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        near = difflib.get_close_matches(str(given).lower(), _ROLES, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise InputError(
            f"{where}, field {role_field!r}: expected user, assistant or system (human, gpt and the like), found "
            f"{_shown(given)}{hint}"
        )
    _note_ignored(turn, (role_field, content_field, *_LEARNT), notes, within="turns'")
    if isinstance(turn[content_field], list):
        content = _text_of_parts(turn[content_field], f"{where}, field {content_field!r}")
    else:
        content = _text(turn, content_field, where, notes)
    return Turn(role, content, is_trained=_is_learnt(turn, where) and role == "assistant")


def _is_learnt(turn: Mapping[str, Any], where: str) -> bool:
    """Whether no field of a turn says that it is not."""
    for name in _LEARNT:
        if turn.get(name) not in (None, 0, 1):
            raise InputError(f"{where}, field {name!r}: expected 0 or 1, found {_shown(turn[name])}")
    return all(turn.get(name) in (None, 1) for name in _LEARNT)


def _text_of_parts(parts: list[object], where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: expected text, or parts of type text, found {_shown(part)}")
        texts.append(part["text"])
    return "".join(texts)


# Prompt and completion, plain text ----------------------------------------------------------------------------------


def _convert_completion(record: Mapping[str, Any], where: str, notes: Notes) -> Completion | Conversation:
    _note_ignored(record, PROMPT_COMPLETION.fields, notes)
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


def _convert_text(record: object, where: str, mark: str, notes: Notes) -> Completion:
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
    notes.several_marks += mark in after
    return Completion(before + found, after)


# Fields -------------------------------------------------------------------------------------------------------------


def _text(record: Mapping[str, Any], name: str, where: str, notes: Notes) -> str:
    if name not in record:
        raise InputError(
            f"{where}: the field {name!r} is missing, found {_fields(record)}; add it{_nearest(record, name)}"
        )
    value = record[name]
    if isinstance(value, int | float) and name in _ANSWERS and math.isfinite(value):  # bool is an int
        notes.scalars += 1
        return value.text if isinstance(value, WrittenNumber) else json.dumps(value)
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
    folded = {key.strip().lower(): key for key in record if isinstance(key, str)}
    near = difflib.get_close_matches(name, folded, n=1)
    if near:
        return f" (is it {folded[near[0]]!r}?)"
    if {"role", "content"} <= folded.keys() or {"from", "value"} <= folded.keys():
        return " (this is one turn: a record holds all turns of a conversation, under 'messages')"
    shared = [(len(set(known.fields) & record.keys()), known) for known in FORMATS]
    most, best = max(shared, key=lambda pair: pair[0])
    return f" (nearest of the known formats: {best.title}, {best.expected})" if most else f" ({_KNOWN})"


def _note_ignored(record: Mapping[str, Any], read: Sequence[str], notes: Notes, *, within: str = "") -> None:
    for name in record.keys() - set(read):
        if record[name] not in (None, "", []):
            notes.ignored[f"{within} {name or '(without a name)'}".strip()] += 1


def _fields(record: Mapping[str, Any]) -> str:
    return f"the fields {reprlib.repr(list(record))}"


def _shown(value: object) -> str:
    kind = "float" if isinstance(value, float) else type(value).__name__
    return f"{kind} {reprlib.repr(value)}"


# The table ----------------------------------------------------------------------------------------------------------

ALPACA = DataFormat(
    "alpaca", "Alpaca's", "instruction, output and perhaps input", ("instruction", "input", "output"),
    lambda record: {"instruction", "output"} <= record.keys(), _convert_alpaca,
)  # fmt: skip
MESSAGES = DataFormat(
    "messages", "messages (OpenAI's)", "messages, a list of turns with role and content", ("messages",),
    lambda record: any(record.get(name) for name in _TURNS) and "from" not in _keys_of(record), _convert_conversation,
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
    lambda record, where, notes: _convert_text(record, where, RESPONSE_MARK, notes),
)  # fmt: skip
FORMATS = (ALPACA, MESSAGES, SHAREGPT, PROMPT_COMPLETION, TEXT)
_KNOWN = "known formats: " + "; ".join(f"{known.name}: {known.expected}" for known in FORMATS)

"""Conversations in records: lists of turns by OpenAI's names or ShareGPT's, and what of them is learnt."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.data.example import Conversation, Turn
from alpaca.data.sources.fields import list_fields, note_ignored, read_text, shown
from alpaca.data.sources.notes import Notes
from alpaca.errors import InputError

TURNS_EXPECTED = "messages, a list of turns with role and content"
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant",
    "tool": "tool", "observation": "tool", "ipython": "tool", "function": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call", "tool_calls")  # fields of a turn, or its role in other programs' data
_LEARNT = ("weight", "train", "training")  # fields that say whether a turn is learnt: OpenAI's, and axolotl's
TURN_FIELDS = ("messages", "conversations", "conversation")  # fields of a record
SYSTEM_FIELDS = ("system", "system_prompt")  # fields beside the turns


def find_turns(record: Mapping[str, Any]) -> tuple[str, Any]:
    """The field that holds a record's turns, and they; ("", None) without one."""
    for name in TURN_FIELDS:
        if isinstance(record.get(name), Sequence) and not isinstance(record[name], str):
            return name, record[name]
    return "", None


def are_turns(found: list[Any]) -> bool:
    return bool(found) and isinstance(found[0], Mapping) and bool({"role", "from"} & found[0].keys())


def keys_of_turns(record: Mapping[str, Any]) -> set[str]:
    turns = find_turns(record)[1]
    return set(turns[0]) if turns and isinstance(turns[0], Mapping) else set()


def convert_conversation(record: Mapping[str, Any], where: str, notes: Notes) -> Conversation:
    name, turns = find_turns(record)
    if turns is None:
        for other in TURN_FIELDS:
            if record.get(other) is not None:
                raise InputError(
                    f"{where}, field {other!r}: expected a list of turns with role and content, found "
                    f"{shown(record[other])}; write it as JSON does"
                )
        raise InputError(f"{where}: expected {TURNS_EXPECTED}, found {list_fields(record)}")
    note_ignored(record, (name, *SYSTEM_FIELDS), notes)
    read = [read_turn(turn, f"{where}, {name}[{number}]", notes) for number, turn in enumerate(turns)]
    for field in SYSTEM_FIELDS:
        if record.get(field) and not any(turn.role == "system" for turn in read):
            read.insert(0, Turn("system", read_text(record, field, where, notes)))
    return make_conversation(read, f"{where}, field {name!r}", notes)


def make_conversation(turns: list[Turn], where: str, notes: Notes) -> Conversation:
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


def read_turn(turn: object, where: str, notes: Notes) -> Turn:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: expected a turn with role and content (or from and value), found {shown(turn)}")
    role_field = "role" if "role" in turn else "from"
    content_field = "value" if "from" in turn and "content" not in turn else "content"
    if missing := [name for name in (role_field, content_field) if name not in turn]:
        raise InputError(f"{where}: the field {missing[0]!r} is missing, found {list_fields(turn)}; add it")
    given = turn[role_field]
    if any(turn.get(name) for name in _CALLS) or given in _CALLS:
        raise InputError(f"{where}: calls of tools are not trained on; found one. Leave the record out")
    role = _ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        near = difflib.get_close_matches(str(given).lower(), _ROLES, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise InputError(
            f"{where}, field {role_field!r}: expected user, assistant or system (human, gpt and the like), found "
            f"{shown(given)}{hint}"
        )
    note_ignored(turn, (role_field, content_field, *_LEARNT), notes, within="turns'")
    if isinstance(turn[content_field], list):
        content = _text_of_parts(turn[content_field], f"{where}, field {content_field!r}")
    else:
        content = read_text(turn, content_field, where, notes)
    return Turn(role, content, is_trained=_is_learnt(turn, where) and role == "assistant")


def _is_learnt(turn: Mapping[str, Any], where: str) -> bool:
    """Whether no field of a turn says that it is not."""
    for name in _LEARNT:
        if turn.get(name) not in (None, 0, 1):
            raise InputError(f"{where}, field {name!r}: expected 0 or 1, found {shown(turn[name])}")
    return all(turn.get(name) in (None, 1) for name in _LEARNT)


def _text_of_parts(parts: list[object], where: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: expected text, or parts of type text, found {shown(part)}")
        texts.append(part["text"])
    return "".join(texts)

"""Records with one answer: Alpaca's, and a prompt with its completion."""

import math
from collections.abc import Mapping
from typing import Any

from alpaca.data.example import Completion, Conversation, Example, Turn
from alpaca.data.sources.fields import note_ignored, read_text, shown
from alpaca.data.sources.notes import Notes
from alpaca.data.sources.turns import make_conversation, read_turn
from alpaca.errors import InputError

ALPACA_FIELDS = ("instruction", "input", "output")
COMPLETION_FIELDS = ("prompt", "completion")


def convert_alpaca(record: Mapping[str, Any], where: str, notes: Notes) -> Example:
    note_ignored(record, ALPACA_FIELDS, notes)
    context = read_context(record, where, notes)
    return Example(read_text(record, "instruction", where, notes), read_text(record, "output", where, notes), context)


def read_context(record: Mapping[str, Any], where: str, notes: Notes) -> str:
    """What stands in `input`; "" for nothing."""
    given = record.get("input")
    has_none = given is None or (isinstance(given, float) and math.isnan(given))  # as pandas writes None
    return "" if has_none else read_text(record, "input", where, notes)


def convert_completion(record: Mapping[str, Any], where: str, notes: Notes) -> Completion | Conversation:
    note_ignored(record, COMPLETION_FIELDS, notes)
    prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Completion(read_text(record, "prompt", where, notes), read_text(record, "completion", where, notes))
    turns: list[Turn] = []
    for name, part in (("prompt", prompt), ("completion", completion)):
        if isinstance(part, str):
            part = [{"role": "user" if name == "prompt" else "assistant", "content": part}]
        if not isinstance(part, list):
            raise InputError(f"{where}, field {name!r}: expected a text or a list of messages, found {shown(part)}")
        read = [read_turn(turn, f"{where}, {name}[{number}]", notes) for number, turn in enumerate(part)]
        turns += [Turn(turn.role, turn.content, turn.is_trained and name == "completion") for turn in read]
    return make_conversation(turns, where, notes)

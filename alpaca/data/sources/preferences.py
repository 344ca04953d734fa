"""Records that compare answers: a chosen and a rejected one (TRL's, Alpaca-like), or one with a label (KTO's)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.data.example import Completion, Conversation, Example, Judged, Pair, Turn
from alpaca.data.sources.answers import convert_alpaca, convert_completion, read_context
from alpaca.data.sources.fields import MissingField, list_fields, note_ignored, read_text, shown
from alpaca.data.sources.notes import Notes
from alpaca.data.sources.turns import SYSTEM_FIELDS, find_turns, make_conversation, read_turn
from alpaca.errors import InputError

PAIR_FIELDS = ("prompt", "chosen", "rejected")
LABELLED_FIELDS = ("prompt", "completion", "label")
_LABELS = ("label", "kto_tag")  # TRL's, and LLaMA-Factory's
_SPEAKER = "\n\nAssistant:"  # in hh-rlhf's transcripts
_SPACE = re.compile(r"\s+")
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def is_pair(record: Mapping[str, Any]) -> bool:
    names = record.keys()
    return "rejected" in names and ("chosen" in names or {"instruction", "output"} <= names)


def is_labelled(record: Mapping[str, Any]) -> bool:
    """Only a truth is a label here: sets of other tasks have numbers and names in a field of that name."""
    names = record.keys()
    has_answer = {"prompt", "completion"} <= names or {"instruction", "output"} <= names
    return has_answer and any(isinstance(record.get(name), bool) for name in _LABELS)


def convert_pair(record: Mapping[str, Any], where: str, notes: Notes) -> Pair:
    """A record's chosen and rejected answers to one prompt. Raises InputError."""
    better = "output" if "chosen" not in record and "output" in record else "chosen"
    for name in (better, "rejected"):
        if name not in record:
            raise MissingField(f"{where}: the field {name!r} is missing, found {list_fields(record)}; add it", name)
    if "instruction" in record:
        note_ignored(record, ("instruction", "input", better, "rejected"), notes)
        instruction, context = read_text(record, "instruction", where, notes), read_context(record, where, notes)
        texts = [read_text(record, name, where, notes) for name in (better, "rejected")]
        return Pair(*(Example(instruction, text, context) for text in texts))
    turns_field = find_turns(record)[0]
    if not turns_field and record.get("prompt") is None and _are_texts(record, better, "rejected"):
        return _convert_whole_texts(record, (better, "rejected"), where, notes)
    note_ignored(record, ("prompt", better, "rejected", turns_field, *SYSTEM_FIELDS), notes)
    if _are_texts(record, "prompt", better, "rejected"):
        prompt = read_text(record, "prompt", where, notes)
        return Pair(*(Completion(prompt, read_text(record, name, where, notes)) for name in (better, "rejected")))
    answers = [_read_turns(record, name, "assistant", where, notes) for name in (better, "rejected")]
    prompt, answers = _find_prompt(_read_prompt(record, turns_field, where, notes), answers, record, where)
    made = zip((better, "rejected"), answers, strict=True)
    return Pair(*(_join(prompt, answer, f"{where}, field {name!r}", notes) for name, answer in made))


def _are_texts(record: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(record.get(name), str) for name in names)


def convert_labelled(record: Mapping[str, Any], where: str, notes: Notes) -> Judged:
    """A record's answer, and whether it is a good one. Raises InputError."""
    name = next((name for name in _LABELS if name in record), _LABELS[0])
    if name not in record:
        raise MissingField(f"{where}: the field {name!r} is missing, found {list_fields(record)}; add it", name)
    value = record[name]
    if isinstance(value, bool | int | str) and str(value).strip().lower() in _TRUTHS:
        is_good = _TRUTHS[str(value).strip().lower()]
    else:
        raise InputError(f"{where}, field {name!r}: expected true or false, found {shown(value)}; mend it")
    rest = {key: content for key, content in record.items() if key != name}
    convert = convert_alpaca if "instruction" in record else convert_completion
    return Judged(convert(rest, where, notes), is_good)


def _convert_whole_texts(record: Mapping[str, Any], names: tuple[str, str], where: str, notes: Notes) -> Pair:
    """Two texts that hold the prompt themselves. Raises InputError where they do not begin alike."""
    note_ignored(record, ("prompt", *names), notes)
    texts = [read_text(record, name, where, notes) for name in names]
    length = _common_prompt(*texts)
    if not texts[0][:length].strip():
        raise InputError(
            f"{where}: expected a prompt, or chosen and rejected as whole texts that begin alike (or as conversations "
            f"that part with the assistant's turn); found {list_fields(record)}. Put what both answer under 'prompt'"
        )
    notes.found_prompts += 1
    return Pair(*(Completion(text[:length], text[length:]) for text in texts))


def _common_prompt(chosen: str, rejected: str) -> int:
    """The length of the prompt that two texts begin with; 0 for none.

    Of transcripts (Anthropic's hh-rlhf) it ends where an assistant begins to speak, of other texts before the space in
    front of the first word that differs. TRL cuts between characters, inside words, which are then tokenized in parts.
    """
    pairs = zip(chosen, rejected, strict=False)
    alike = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    if _SPEAKER in chosen and _SPEAKER in rejected:
        start = chosen.rfind(_SPEAKER, 0, alike)
        return start + len(_SPEAKER) if start >= 0 else 0
    words = [space.start() for space in _SPACE.finditer(chosen, 0, alike)]
    return words[-1] if words else 0


def _read_turns(record: Mapping[str, Any], name: str, role: str, where: str, notes: Notes) -> list[Turn]:
    """The turns in a field: a list of them, one of them, or a text, which is `role`'s."""
    value = record[name]
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [read_turn(turn, f"{where}, {name}[{number}]", notes) for number, turn in enumerate(value)]
    return [Turn(role, read_text(record, name, where, notes), is_trained=role == "assistant")]


def _read_prompt(record: Mapping[str, Any], turns_field: str, where: str, notes: Notes) -> list[Turn]:
    """The turns before the answers; none where the answers hold them."""
    name = "prompt" if record.get("prompt") is not None else turns_field
    turns = _read_turns(record, name, "user", where, notes) if name else []
    for field in SYSTEM_FIELDS:
        if record.get(field) and not any(turn.role == "system" for turn in turns):
            turns.insert(0, Turn("system", read_text(record, field, where, notes)))
    return turns


def _find_prompt(
    given: list[Turn], answers: list[list[Turn]], record: Mapping[str, Any], where: str
) -> tuple[list[Turn], list[list[Turn]]]:
    """The prompt's turns and the answers' own. Answers may be whole conversations, which begin with the prompt.

    Raises InputError where there is none, or it is not what the record has as its prompt.
    """
    if given and all(answer and answer[0].role == "assistant" for answer in answers):
        return given, answers
    said = [_said(answer) for answer in answers]
    most = max(0, min(map(len, said)) - 1)
    shared = next((place for place in range(most) if said[0][place] != said[1][place]), most)
    prompt, rests = answers[0][:shared], [answer[shared:] for answer in answers]
    if not prompt or any(rest[0].role != "assistant" for rest in rests):
        raise InputError(
            f"{where}: expected a prompt, or chosen and rejected as conversations that begin alike and part with the "
            f"assistant's turn; found {list_fields(record)}. Put what both answer under 'prompt'"
        )
    asked = [turn for turn in given if turn.role != "system"] if record.get("prompt") is not None else []
    if not {content for _, content in _said(asked)} <= {content for _, content in _said(prompt)}:
        raise InputError(
            f"{where}, field 'prompt': chosen and rejected hold another prompt in their own turns; remove one of them"
        )
    system = [turn for turn in given if turn.role == "system" and not any(own.role == "system" for own in prompt)]
    return system + prompt, rests


def _said(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


def _join(prompt: list[Turn], answer: list[Turn], where: str, notes: Notes) -> Conversation:
    """One conversation, of which the answer's turns alone are learnt."""
    return make_conversation([*(Turn(turn.role, turn.content) for turn in prompt), *answer], where, notes)

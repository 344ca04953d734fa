"""Mends a data set of any format by named rules and logs each change; ambiguous records are left as they are.

Rules that change a text: line_ends, control_characters, surrounding_whitespace, no_input_placeholder, leaked_task.
Rules that drop a record: unreadable_record, empty_instruction, empty_output, placeholder_output, exact_duplicate.
A record is mended until no rule changes it, so a clean set comes out as it went in. Alpaca's records keep their further
fields; turns come out as `messages`. Of texts without a template only line ends and control characters are mended.
Not mended, for want of a safe rule: wrong sums, links, refusals, near copies, several answers to one prompt.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from alpaca.data.analysis.checks import before_leaked_block, says_no_input, says_no_output
from alpaca.data.example import AnyExample, Completion, Conversation, Turn
from alpaca.data.sources.formats import RecordReader
from alpaca.errors import InputError
from alpaca.files.atomic import write_text

MEANINGS = {
    "line_ends": "carriage returns become line feeds",
    "control_characters": "control characters and byte order marks are removed",
    "surrounding_whitespace": "white space around a text is removed (but not the first indentation of several lines)",
    "no_input_placeholder": 'an input such as "<noinput>", "No input" or "N/A" becomes empty',
    "leaked_task": 'an answer is cut before the header of a further task ("### Instruction:", "8. Instruction:")',
    "unreadable_record": "dropped: no record of the data's format",
    "empty_instruction": "dropped: instruction and input are both empty",
    "empty_output": "dropped: the answer is empty",
    "placeholder_output": 'dropped: the answer is only "<nooutput>", "<noinput>", "null", "TODO" or the like',
    "exact_duplicate": "dropped: instruction, input and output equal those of an earlier record",
}
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_TEXTS = ("instruction", "input", "output")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One line of the log: a rule changed a field, or dropped a record (field None; before: the record, after None).

    index: of the record in what was read, counted from 0.   same_as: for a copy, the index of the one that is kept.
    """

    index: int
    rule: str
    field: str | None = None
    before: object = None
    after: str | None = None
    same_as: int | None = None

    def as_json(self) -> dict[str, object]:
        entry = {
            "index": self.index,
            "rule": self.rule,
            "field": self.field,
            "before": self.before,
            "after": self.after,
        }
        return entry if self.same_as is None else {**entry, "same_as": self.same_as}


def clean_records(
    records: Sequence[tuple[str, object]], reader: RecordReader, *, progress: bool = True
) -> tuple[list[Mapping[str, object]], list[Change]]:
    """(the records that are left, mended; every change) of records as `read_records` gives them."""
    kept: list[Mapping[str, object]] = []
    changes: list[Change] = []
    first: dict[AnyExample, int] = {}
    bar = tqdm(records, desc="clean", unit=" records", delay=1, disable=None if progress else True)
    for index, (where, record) in enumerate(bar):
        try:
            found = reader.convert(record, where)
        except InputError:
            changes.append(Change(index=index, rule="unreadable_record", before=record))
            continue
        example, made = _mend(index, found)
        changes += made
        if dropped := _reason_to_drop(example):
            changes.append(Change(index=index, rule=dropped, before=record))
        elif (same_as := first.setdefault(example, index)) != index:
            changes.append(Change(index=index, rule="exact_duplicate", before=record, same_as=same_as))
        else:
            kept.append(_as_record(example, record))
    return kept, changes


def _as_record(example: AnyExample, record: object) -> Mapping[str, object]:
    """A record that reads as this example; of Alpaca's, `record` with its texts mended."""
    if isinstance(example, Conversation):
        return {"messages": [_as_message(turn) for turn in example.turns]}
    if isinstance(example, Completion):
        return {"prompt": example.prompt, "completion": example.completion}
    assert isinstance(record, Mapping)
    texts = {"instruction": example.instruction, "output": example.output}
    return {**record, **texts, **({"input": example.input} if record.get("input") is not None else {})}


def _as_message(turn: Turn) -> dict[str, object]:
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    return {**message, "weight": 0} if turn.role == "assistant" and not turn.is_trained else message


def write_clean(path: Path, kept: Sequence[Mapping[str, object]], changes: Sequence[Change]) -> Path:
    """Write the mended set as a JSON list that train.py reads, and its log beside it; returns the log's path.

    Raises InputError when nothing would be left.
    """
    if not kept:
        raise InputError(f"cleaning would leave no record; {path} was not written (the report says what is wrong)")
    log = log_path(path)
    write_text(log, "".join(f"{_json(change.as_json())}\n" for change in changes))
    write_text(path, _json(list(kept), indent=2) + "\n")
    return log


def _json(content: object, *, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: a lone surrogate, which a dropped record may have, stays an escape."""
    text = json.dumps(content, ensure_ascii=False, default=str, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def log_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.log.jsonl")


def _reason_to_drop(example: AnyExample) -> str | None:
    if not example.instruction and not example.input:
        return "empty_instruction"
    if not example.output:
        return "empty_output"
    return "placeholder_output" if says_no_output(example.output) else None


def _mend(index: int, example: AnyExample) -> tuple[AnyExample, list[Change]]:
    """The example with each rule applied until none changes it, and the changes."""
    changes: list[Change] = []

    def mended(name: str, kind: str, text: str) -> str:
        rules = _MENDS if kind in _TEXTS else _MENDS_OF_PLAIN_TEXT
        done = False
        while not done:
            done = True
            for rule, mend in rules.items():
                after = mend(kind, text)
                if after != text:
                    changes.append(Change(index=index, rule=rule, field=name, before=text, after=after))
                    text, done = after, False
        return text

    if isinstance(example, Conversation):
        turns = [
            replace(turn, content=mended(f"messages[{number}].content", _kind(turn), turn.content))
            for number, turn in enumerate(example.turns)
        ]
        return Conversation(tuple(turns)), changes
    if isinstance(example, Completion):
        texts = {name: mended(name, "plain", getattr(example, name)) for name in ("prompt", "completion")}
    else:
        texts = {name: mended(name, name, getattr(example, name)) for name in _TEXTS}
    return replace(example, **texts), changes


def _kind(turn: Turn) -> str:
    return "output" if turn.role == "assistant" else "instruction"


def _mend_line_ends(_field: str, text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _mend_controls(_field: str, text: str) -> str:
    return _CONTROLS.sub("", text)


def _mend_whitespace(_field: str, text: str) -> str:
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()
    return text if "\n" in text else text.strip()  # in a block of code the first line's indentation counts


def _mend_no_input(field: str, text: str) -> str:
    return "" if field == "input" and says_no_input(text) else text


def _mend_leaked_task(field: str, text: str) -> str:
    answer = before_leaked_block(text) if field == "output" else None
    return text if answer is None else answer


_MENDS: dict[str, Callable[[str, str], str]] = {
    "line_ends": _mend_line_ends,
    "control_characters": _mend_controls,
    "surrounding_whitespace": _mend_whitespace,
    "no_input_placeholder": _mend_no_input,
    "leaked_task": _mend_leaked_task,
}
_MENDS_OF_PLAIN_TEXT = {name: _MENDS[name] for name in ("line_ends", "control_characters")}

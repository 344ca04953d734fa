"""Mending: every rule, nothing else, and nothing left to do the second time."""

import json
from pathlib import Path

import pytest

from alpaca.data.analysis.cleaning import MEANINGS, clean_records, write_clean
from alpaca.data.example import Example
from alpaca.data.records import make_reader, read_examples
from alpaca.errors import InputError

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Red."}
MENDED = [  # (rule, field, before, after)
    ("line_ends", "output", "a\r\nb\rc", "a\nb\nc"),
    ("control_characters", "instruction", "\ufeffName\x00 it.", "Name it."),
    ("surrounding_whitespace", "output", " \n\n  one\n  two \n", "  one\n  two"),
    ("surrounding_whitespace", "instruction", "  Name it. ", "Name it."),
    ("surrounding_whitespace", "input", " \n", ""),
    ("no_input_placeholder", "input", "<noinput>", ""),
    ("no_input_placeholder", "input", "No input.", ""),
    ("no_input_placeholder", "input", "N/A", ""),
    ("leaked_task", "output", "Blue.\n##\n8. Instruction: Go.\n8. Input:\nx\n8. Output:\ny", "Blue."),
    ("leaked_task", "output", "Blue.\n\n### Instruction:\nGo.", "Blue."),
    ("leaked_task", "output", "  Blue.\n### Instruction:\nGo.", "Blue."),  # the indentation goes in a second round
]
DROPPED = [
    ("unreadable_record", {"instruction": "Name it."}),
    ("unreadable_record", ["no", "record"]),
    ("unreadable_record", {"instruction": "Name it.", "output": None}),
    ("unreadable_record", {"instruction": "Name it.", "output": "lone \ud800 surrogate"}),
    ("empty_instruction", {"instruction": " ", "input": "<noinput>", "output": "Red."}),
    ("empty_output", {"instruction": "Name it.", "input": "", "output": " \n"}),
    ("placeholder_output", {"instruction": "Draw it.", "input": "", "output": "<nooutput>"}),
    ("exact_duplicate", {"instruction": "Name a colour. ", "input": "No input", "output": "Red."}),
]
LEFT_ALONE = [  # ambiguous, or right
    {"instruction": "Add.", "input": "None", "output": "2 + 2 = 5"},
    {"instruction": "Name it.", "input": "NA", "output": "N/A"},
    {"instruction": "Name it.", "input": "", "output": "### Instruction: starts at once"},
    {"instruction": "Name it.", "input": "", "output": "Steps:\n1. Input: the data\n2. Output: the sum"},
    {"instruction": "Name it.", "input": "", "output": "    indented\n    code"},
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Look.", "output": "I'm sorry, but I can't see http://example.org", "id": 7, "tags": ["a"]},
]


def numbered(records: list[object]) -> list[tuple[str, object]]:
    return [(f"record {index}", record) for index, record in enumerate(records)]


def clean(records: list[tuple[str, object]]):
    return clean_records(records, make_reader(records), progress=False)


@pytest.mark.parametrize(("rule", "field", "before", "after"), MENDED)
def test_mends(rule: str, field: str, before: str, after: str):
    record = {**GOOD, field: before}
    kept, changes = clean(numbered([record]))
    assert kept == [{**GOOD, field: after}]
    assert rule in {change.rule for change in changes}
    assert changes[0].before == before
    assert changes[-1].after == after
    assert {(change.index, change.field) for change in changes} == {(0, field)}
    assert record[field] == before  # what was read stays as it was


@pytest.mark.parametrize(("rule", "record"), DROPPED)
def test_drops(rule: str, record: object):
    kept, changes = clean(numbered([GOOD, record]))
    assert kept == [GOOD]
    last = changes[-1].as_json()
    assert (last["index"], last["rule"], last["field"], last["before"], last["after"]) == (1, rule, None, record, None)
    assert last.get("same_as") == (0 if rule == "exact_duplicate" else None)


def test_every_rule_is_tested_and_has_a_meaning():
    assert {rule for rule, *_ in MENDED} | {rule for rule, _ in DROPPED} == MEANINGS.keys()


def test_leaves_alone_what_is_ambiguous():
    kept, changes = clean(numbered([GOOD, *LEFT_ALONE]))
    assert kept == [GOOD, *LEFT_ALONE]
    assert changes == []


def test_a_clean_set_stays_as_it_is(real: Path):
    """The 4,000 real examples, and every crafted record, cleaned twice."""
    records = json.loads((real / "alpaca_4000.json").read_text("utf-8"))
    records += [{**GOOD, field: f"{before}{place}"} for place, (_, field, before, _) in enumerate(MENDED)]
    records += [record for _, record in DROPPED] + LEFT_ALONE
    kept, changes = clean(numbered(records))
    assert len(changes) > 60
    assert clean(numbered(kept)) == (kept, [])


def test_files_are_what_training_reads(tmp_path: Path):
    path = tmp_path / "clean.json"
    kept, changes = clean(numbered([{**GOOD, "input": "<noinput>"}, GOOD, *LEFT_ALONE]))
    log = write_clean(path, kept, changes)
    assert read_examples(path)[0] == Example(instruction="Name a colour.", output="Red.")
    assert json.loads(path.read_text())[-1] == LEFT_ALONE[-1]  # further fields are kept
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.name == "clean.json.log.jsonl"
    assert [(entry["index"], entry["rule"]) for entry in entries] == [
        (0, "no_input_placeholder"),
        (1, "exact_duplicate"),
    ]
    assert entries[0] == {
        "index": 0, "rule": "no_input_placeholder", "field": "input", "before": "<noinput>", "after": "",
    }  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean.json", "clean.json.log.jsonl"]


def test_what_utf8_cannot_hold_is_logged_as_it_was(tmp_path: Path):
    bad = {"instruction": "Name it.", "output": "lone \ud800 surrogate \\"}
    kept, changes = clean(numbered([{**GOOD, "note": "\udfff é"}, bad]))
    log = write_clean(tmp_path / "clean.json", kept, changes)
    assert json.loads(log.read_text("utf-8"))["before"] == bad
    assert json.loads((tmp_path / "clean.json").read_text("utf-8"))[0]["note"] == "\udfff é"


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path: Path):
    kept, changes = clean(numbered([{**GOOD, "output": ""}]))
    with pytest.raises(InputError, match="would leave no record"):
        write_clean(tmp_path / "clean.json", kept, changes)
    assert not list(tmp_path.iterdir())

"""Records that compare answers: each spelling of them, what cannot be one, and who may read them."""

import json
from pathlib import Path

import pytest

from alpaca.data.example import Completion, Conversation, Example, Judged, Pair, Turn
from alpaca.data.preferences import arrange
from alpaca.data.records import read_any_data, read_data
from alpaca.data.report import parse_arguments, write_outputs
from alpaca.errors import BadExamples, InputError

QUESTION = {"role": "user", "content": "What is 2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}


def conversation(*said: tuple[str, str]) -> Conversation:
    """Turns of which the last is learnt."""
    turns = [Turn(role, text) for role, text in said]
    return Conversation((*turns[:-1], Turn(*said[-1], is_trained=True)))


def asked(answer: str, *before: tuple[str, str]) -> Conversation:
    return conversation(*before, ("user", "What is 2+2?"), ("assistant", answer))


TALK = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: 2+2?\n\nAssistant:"
PLAIN = Pair(asked("4"), asked("5"))
SYSTEM = Pair(*(asked(answer, ("system", "Be short.")) for answer in ("4", "5")))
PAIRS: dict[str, tuple[dict[str, object], Pair]] = {
    "texts": (
        {"prompt": "What is 2+2? ", "chosen": "4", "rejected": "5"},
        Pair(Completion("What is 2+2? ", "4"), Completion("What is 2+2? ", "5")),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 2", "chosen": 4, "rejected": "5"},
        Pair(Example("Add.", "4", "2 2"), Example("Add.", "5", "2 2")),
    ),
    "alpaca's output": (
        {"instruction": "Add.", "input": "", "output": "4", "rejected": "5"},
        Pair(Example("Add.", "4"), Example("Add.", "5")),
    ),
    "messages": ({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
    "messages without a prompt": ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, PLAIN),
    "messages with their prompt as text": (
        {"prompt": "What is 2+2?", "prompt_id": "a1", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        PLAIN,
    ),
    "messages beside a conversation": (
        {"messages": [QUESTION, GOOD], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD], "score_chosen": 9.5},
        PLAIN,
    ),
    "a text before messages": ({"prompt": "What is 2+2?", "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
    "texts after messages": ({"prompt": [QUESTION], "chosen": "4", "rejected": "5"}, PLAIN),
    "single turns after a conversation": (
        {"conversations": [{"from": "human", "value": "What is 2+2?"}], "system": "Be short."}
        | {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        SYSTEM,
    ),
    "a system turn in the prompt": (
        {"prompt": [{"role": "system", "content": "Be short."}, QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        SYSTEM,
    ),
    "the same answer twice": ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD]}, Pair(asked("4"), asked("4"))),
    "transcripts": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4 it is", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 45"},
        Pair(*(Completion("\n\nHuman: 2+2?\n\nAssistant:", answer) for answer in (" 4 it is", " 45"))),
    ),
    "transcripts of several turns": (
        {"chosen": f"{TALK} Four.\n\nHuman: Sure?\n\nAssistant: Yes.", "rejected": f"{TALK} Five."},
        Pair(Completion(TALK, " Four.\n\nHuman: Sure?\n\nAssistant: Yes."), Completion(TALK, " Five.")),
    ),
    "transcripts of which one goes on": (
        {"chosen": f"{TALK} Four.\n\nHuman: Thanks\n\nAssistant: Bye", "rejected": f"{TALK} Four."},
        Pair(Completion(TALK, " Four.\n\nHuman: Thanks\n\nAssistant: Bye"), Completion(TALK, " Four.")),
    ),
    "an answer that is missing in a transcript": (
        {"chosen": f"{TALK} Four.", "rejected": TALK, "prompt": None},
        Pair(Completion(TALK, " Four."), Completion(TALK, "")),
    ),
    "texts that begin alike": (
        {"chosen": "It is warm in May.", "rejected": "It is wary of us."},
        Pair(Completion("It is", " warm in May."), Completion("It is", " wary of us.")),
    ),
    "texts that part behind a line": (
        {"chosen": "2+2?\n\n4", "rejected": "2+2?\n\n5"},
        Pair(Completion("2+2?", "\n\n4"), Completion("2+2?", "\n\n5")),
    ),
    "a text that goes on": (
        {"chosen": "It is warm", "rejected": "It is warm today"},
        Pair(Completion("It is", " warm"), Completion("It is", " warm today")),
    ),
    "answers of several turns": (
        {"prompt": [QUESTION], "chosen": [GOOD, QUESTION, GOOD], "rejected": [BAD]},
        Pair(
            Conversation(
                (Turn("user", "What is 2+2?"), Turn("assistant", "4", is_trained=True), Turn("user", "What is 2+2?"),
                 Turn("assistant", "4", is_trained=True))
            ),
            asked("5"),
        ),
    ),
}  # fmt: skip
LABELLED: dict[str, tuple[dict[str, object], Judged]] = {
    "texts": ({"prompt": "2+2=", "completion": "4", "label": True}, Judged(Completion("2+2=", "4"), True)),
    "messages": ({"prompt": [QUESTION], "completion": [BAD], "label": False}, Judged(asked("5"), False)),
    "alpaca": ({"instruction": "Add.", "output": "5", "label": False}, Judged(Example("Add.", "5"), False)),
    "a tag": ({"instruction": "Add.", "output": "4", "kto_tag": True}, Judged(Example("Add.", "4"), True)),
}


def write(folder: Path, *records: object) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_recognised(tmp_path: Path, kind: str):
    record, expected = PAIRS[kind]
    examples, reader = read_any_data(write(tmp_path, record, record))
    assert reader.format.name == "preference"
    assert reader.lines()[0] == "read as preferences: a prompt (or an instruction), chosen and rejected"
    assert examples == [expected, expected]


@pytest.mark.parametrize("kind", LABELLED)
def test_labels_are_recognised(tmp_path: Path, kind: str):
    record, expected = LABELLED[kind]
    examples, reader = read_any_data(write(tmp_path, record))
    assert (reader.format.name, examples) == ("labelled", [expected])


@pytest.mark.parametrize(("label", "expected"), [(1, True), ("False", False), ("true", True), (0, False)])
def test_other_spellings_of_a_label_are_read_where_asked(tmp_path: Path, label: object, expected: bool):
    path = write(tmp_path, {"prompt": "a", "completion": "b", "label": label})
    assert read_data(path)[0] == [Completion("a", "b")]  # as they are, these are no labels
    assert read_any_data(path, data_format="labelled")[0] == [Judged(Completion("a", "b"), expected)]


BAD_RECORDS: dict[str, tuple[dict[str, object], str]] = {
    "no prompt": ({"chosen": "a", "rejected": "b"}, r"from 0\): expected a prompt, or chosen and.*under 'prompt'"),
    "nothing in common": (
        {"chosen": [QUESTION, GOOD], "rejected": [{**QUESTION, "content": "And 3+3?"}, BAD]},
        r"from 0\): expected a prompt, or chosen and rejected as conversations that begin alike",
    ),
    "transcripts of two questions": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 3+3?\n\nAssistant: 6"},
        r"from 0\): expected a prompt, or chosen and rejected as whole texts that begin alike",
    ),
    "texts that begin with a space": ({"chosen": " a b", "rejected": " c d"}, r"from 0\): expected a prompt, or"),
    "another prompt": (
        {"prompt": "And 3+3?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        r"from 0\), field 'prompt': chosen and rejected hold another prompt in their own turns",
    ),
    "a list": ({"prompt": "a", "chosen": "b", "rejected": [1]}, r"from 0\), rejected\[0\]: expected a turn with role"),
    "an answer of nobody": (
        {"prompt": "a", "chosen": "b", "rejected": None},
        r"from 0\), field 'rejected': expected text, found NoneType None",
    ),
    "a score": ({"prompt": "a", "completion": "b", "label": 0.7}, r"expected true or false, found float 0.7"),
    "no label": ({"prompt": "a", "completion": "b"}, r"from 0\): the field 'label' is missing"),
    "one answer": ({"prompt": "a", "chosen": "b"}, r"from 0\): the field 'rejected' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_what_compares_nothing_is_named(tmp_path: Path, kind: str):
    record, message = BAD_RECORDS[kind]
    name = "labelled" if "completion" in record else "preference"
    with pytest.raises(BadExamples, match=message):
        read_any_data(write(tmp_path, record), data_format=name)


PAIR, LABEL = PAIRS["texts"][0], LABELLED["texts"][0]


@pytest.mark.parametrize(
    ("record", "objective", "message"),
    [
        (PAIR, "sft", r"expected one answer for each prompt, found preferences .*--objective dpo, orpo or kto"),
        (LABEL, "sft", r"expected one answer for each prompt, found labelled answers .*--objective kto;"),
        (LABEL, "dpo", r"--objective dpo needs two answers to each prompt.*--objective kto takes single ones"),
        (
            {"prompt": "a", "completion": "b"},
            "orpo",
            r"--objective orpo needs chosen.*leave --objective out",
        ),
        ({"instruction": "a", "output": "b"}, "kto", r"--objective kto needs labelled answers.*found Alpaca's"),
    ],
)
def test_an_objective_refuses_data_of_another(tmp_path: Path, record: dict, objective: str, message: str):
    path = write(tmp_path, record)
    examples, reader = read_any_data(path)
    with pytest.raises(BadExamples, match=message):
        arrange(examples, reader, objective=objective, path=str(path))


def test_pairs_are_taken_apart_for_kto(tmp_path: Path):
    path = write(tmp_path, PAIR)
    examples, reader = read_any_data(path)
    expected = [Judged(Completion("What is 2+2? ", "4"), True), Judged(Completion("What is 2+2? ", "5"), False)]
    assert arrange(examples, reader, objective="kto", path=str(path)) == expected
    assert arrange(examples, reader, objective="dpo", path=str(path)) == examples


def test_other_readers_say_what_to_do(tmp_path: Path):
    path = write(tmp_path, {"instruction": "Add.", "output": "4", "rejected": "5"})
    with pytest.raises(BadExamples, match=r"train.py takes them with --objective dpo, orpo or kto"):
        read_data(path)
    arguments = ["--data_path", str(path), "--output", str(tmp_path / "report.html")]
    with pytest.raises(InputError, match=r"expected one answer for each prompt, found preferences"):
        write_outputs(parse_arguments(arguments))
    assert read_data(path, data_format="alpaca")[0] == [Example("Add.", "4")]

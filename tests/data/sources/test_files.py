"""Files as people have them: whatever they are called and however they are packed, they give the same examples."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from alpaca.data.example import Completion, Conversation, Example, Turn
from alpaca.data.records import DATA_FORMATS, read_data
from alpaca.errors import BadExamples, InputError, MissingPackage

ALPACA = [
    {"instruction": "Name a bird.", "input": "", "output": "A condor."},
    {"instruction": 'Say "hi", twice', "input": "a\nb", "output": "hi, hi\u2028é"},
]
ALPACA_READ = [Example("Name a bird.", "A condor."), Example('Say "hi", twice', "hi, hi\u2028é", "a\nb")]
CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a bird."},
    {"role": "assistant", "content": "A condor."},
]  # fmt: skip
CHAT_READ = Conversation(
    (Turn("system", "Be brief."), Turn("user", "Name a bird."), Turn("assistant", "A condor.", is_trained=True))
)
SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Name a bird."},
            {"from": "gpt", "value": "A condor."}]  # fmt: skip


def lines(records: list) -> str:
    return "\n".join(json.dumps(record) for record in records)


def columns(records: list[dict]) -> dict[str, list]:
    return {name: [record[name] for record in records] for name in records[0]}


def table(delimiter: str, records: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


ALPACA_FILES: dict[str, str] = {
    "list": json.dumps(ALPACA),
    "lines": lines(ALPACA),
    "lines of DOS": lines(ALPACA).replace("\n", "\r\n"),
    "columns": json.dumps(columns(ALPACA)),
    "columns of pandas": json.dumps({name: dict(enumerate(column)) for name, column in columns(ALPACA).items()}),
    "splits": json.dumps({"train": ALPACA, "test": [{"instruction": "x", "output": "y"}]}),
    "splits, indented": json.dumps({"test": [], "train": ALPACA}, indent=2),
    "splits of columns": json.dumps({"train": columns(ALPACA)}),
    "under data": json.dumps({"version": "1.0", "data": ALPACA}),
    "the hub's viewer, with types": json.dumps(
        {
            "features": [{"name": "instruction"}],
            "rows": [{"row_idx": 0, "row": row} for row in ALPACA],
            "partial": False,
        }
    ),
    "objects one after the other": "\n".join(json.dumps(record, indent=2) for record in ALPACA),
    "lines of the old Mac": lines(ALPACA).replace("\n", "\r"),
    "files with marks put together": "\n".join("\ufeff" + json.dumps(record) for record in ALPACA),
    "empty lines before a table": "\n\r\n" + table(",", ALPACA),
    "the hub's viewer": json.dumps({"rows": [{"row_idx": k, "row": row} for k, row in enumerate(ALPACA)], "total": 2}),
    "csv": table(",", ALPACA),
    "tsv": table("\t", ALPACA),
    "semicolons": table(";", ALPACA),
}


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, "bom": lambda content: b"\xef\xbb\xbf" + content, "gz": gzip.compress, "bz2": bz2.compress,
    "xz": lzma.compress, "gz of gz": lambda content: gzip.compress(gzip.compress(content)),
    "gz in two members": lambda content: gzip.compress(content[:9]) + gzip.compress(content[9:]),
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "UTF-16, high byte first": lambda content: b"\xfe\xff" + content.decode().encode("utf-16-be"),
    "UTF-32": lambda content: content.decode().encode("utf-32"),
}  # fmt: skip


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("kind", ALPACA_FILES)
@pytest.mark.fast_rows(45)
def test_all_containers_give_the_same_examples(tmp_path: Path, kind: str, pack: Callable[[bytes], bytes]):
    (tmp_path / "data").write_bytes(pack(ALPACA_FILES[kind].encode()))
    examples, reader = read_data(tmp_path / "data")
    assert examples == ALPACA_READ
    assert reader.format.name == "alpaca"


FORMATS: dict[str, tuple[str, object, object]] = {  # the format's name, a record, its example
    "messages": ("messages", {"messages": CHAT}, CHAT_READ),
    "messages in parts": (
        "messages",
        {"messages": [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "Name a bird."}]}, CHAT[2]]},
        CHAT_READ,
    ),
    "conversations of roles": ("messages", {"conversations": CHAT}, CHAT_READ),
    "sharegpt": ("sharegpt", {"id": 7, "conversations": SHAREGPT}, CHAT_READ),
    "sharegpt, system beside": ("sharegpt", {"system": "Be brief.", "conversations": SHAREGPT[1:]}, CHAT_READ),
    "sharegpt, user and assistant": (
        "sharegpt",
        {"conversations": [{"from": "User", "value": "Name a bird."}, {"from": "assistant", "value": "A condor."}]},
        Conversation(CHAT_READ.turns[1:]),
    ),
    "unanswered": ("messages", {"messages": [*CHAT, {"role": "user", "content": "Another?"}]}, CHAT_READ),
    "weights": (
        "messages",
        {"messages": [*CHAT[:2], {**CHAT[2], "weight": 0}, CHAT[1], {**CHAT[2], "weight": 1}]},
        Conversation((*CHAT_READ.turns[:2], Turn("assistant", "A condor."), *CHAT_READ.turns[1:])),
    ),
    "axolotl's flags": (
        "messages",
        {"messages": [*CHAT[:2], {**CHAT[2], "train": False}, CHAT[1], {**CHAT[2], "training": True}]},
        Conversation((*CHAT_READ.turns[:2], Turn("assistant", "A condor."), *CHAT_READ.turns[1:])),
    ),
    "system_prompt": ("sharegpt", {"system_prompt": "Be brief.", "conversations": SHAREGPT[1:]}, CHAT_READ),
    "written ai": ("messages", {"messages": [*CHAT[:2], {"role": "AI", "content": "A condor."}]}, CHAT_READ),
    "prompt and completion": (
        "prompt_completion", {"prompt": "One two", "completion": " three"}, Completion("One two", " three"),
    ),
    "conversational prompt": ("prompt_completion", {"prompt": CHAT[:2], "completion": CHAT[2:]}, CHAT_READ),
    "text": (
        "text",
        {"text": "### Instruction:\nAdd.\n\n### Response:\n3"},
        Completion("### Instruction:\nAdd.\n\n### Response:", "\n3"),
    ),
    "bare text": ("text", "Q ### Response: A", Completion("Q ### Response:", " A")),
    "a number": ("alpaca", {"instruction": "1 + 1", "output": 2}, Example("1 + 1", "2")),
    "digits as written": ("alpaca", {"instruction": "pi", "output": 3.14}, Example("pi", "3.14")),
    "no input, of pandas": ("alpaca", {"instruction": "a", "input": float("nan"), "output": "b"}, Example("a", "b")),
    "a truth": ("alpaca", {"instruction": "1 = 1", "output": True}, Example("1 = 1", "true")),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_recognised_by_content(tmp_path: Path, kind: str):
    name, record, expected = FORMATS[kind]
    for number, text in enumerate([json.dumps([record] * 3), lines([record] * 3), json.dumps([record])]):
        (tmp_path / str(number)).write_text(text)
        examples, reader = read_data(tmp_path / str(number))
        assert set(examples) == {expected}
        assert reader.format.name == name
        assert read_data(tmp_path / str(number), data_format=name)[0] == examples


def test_what_was_done_on_the_way_is_said(tmp_path: Path):
    records = [{"instruction": "a", "output": 1, "topic": "sums"}, {"instruction": "a", "output": "b", "topic": ""}]
    (tmp_path / "data").write_text(json.dumps(records))
    assert read_data(tmp_path / "data")[1].lines() == [
        "read as Alpaca's: instruction, output and perhaps input",
        "1 answers are numbers or the like; their JSON text is taken",
        "fields that are not read: topic",
    ]


def test_numbers_keep_their_digits(tmp_path: Path):
    """As a double, 3.14…279 would lose half of them, and 1.50 would lose its zero."""
    answers = ["3.141592653589793238462643383279", "1.50", "1E5", "-0.0", "123456789012345678901234567890"]
    (tmp_path / "data").write_text("".join(f'{{"instruction": "a", "output": {answer}}}\n' for answer in answers))
    assert [example.output for example in read_data(tmp_path / "data")[0]] == answers


def test_fields_of_turns_that_are_not_read_are_said(tmp_path: Path):
    turns = [{**CHAT[1], "name": "Ann"}, {**CHAT[2], "reasoning_content": "Birds fly."}]
    (tmp_path / "data").write_text(lines([{"messages": turns, "source": "me", "tools": None}]))
    said = read_data(tmp_path / "data")[1].lines()
    assert said[1:] == ["fields that are not read: source, turns' name, turns' reasoning_content"]


def test_a_mark_that_comes_again_is_said(tmp_path: Path):
    (tmp_path / "data").write_text(lines([{"text": "Q: a A: b Q: c A: d"}, {"text": "Q: a A: b"}]))
    said = read_data(tmp_path / "data", response_mark="A:")[1].lines()
    assert said[1:] == ["1 texts hold the response mark more than once; all behind the first is learnt"]


def test_tables_of_turns_hold_them_as_json(tmp_path: Path):
    (tmp_path / "data.csv").write_text(table(",", [{"id": 1, "messages": json.dumps(CHAT)}]))
    assert read_data(tmp_path / "data.csv")[0] == [CHAT_READ]


def test_the_response_mark_is_the_users(tmp_path: Path):
    (tmp_path / "data").write_text(lines([{"text": "Q: 1 + 1\nA: 2"}]))
    assert read_data(tmp_path / "data", response_mark="\nA:")[0] == [Completion("Q: 1 + 1\nA:", " 2")]


BAD: dict[str, tuple[object, str]] = {
    "no turn of the assistant": (
        [{"messages": CHAT[:2]}], r"record 0 .*'messages': expected at least one turn of the assistant .*system, user",
    ),
    "unknown role": (
        [{"messages": [{"role": "asistant", "content": "x"}]}],
        r"record 0 .*messages\[0\], field 'role': expected user, .* found str 'asistant'; the nearest is 'assistant'",
    ),
    "no content": ([{"messages": [{"role": "user"}]}], r"messages\[0\]: the field 'content' is missing.*\['role'\]"),
    "null content": ([{"messages": [{"role": "user", "content": None}]}], r"'content': expected text, found None"),
    "tool call": (
        [{"messages": [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [{}]}]}], r"calls of tools are not",
    ),
    "image": (
        [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, CHAT[2]]}],
        r"messages\[0\], field 'content': expected text, or parts of type text, found dict",
    ),
    "late system": ([{"messages": [*CHAT[1:], CHAT[0], CHAT[2]]}], r"a system turn may only come first; turn 2 is one"),
    "another format later": (
        [ALPACA[0], {"messages": CHAT}],
        r"record 1 .*'instruction' is missing.*looks like messages.*: --data_format messages reads it as that",
    ),
    "nearly a field": ([{"instructions": "a", "output": "b"}], r"'instruction' is missing.*\(is it 'instructions'\?\)"),
    "nearest format": ([{"prompt": "a", "response": "b"}], r"nearest of the known formats: prompt and completion"),
    "nothing known": ([{"question": "a", "answer": "b"}], r"known formats: alpaca: instruction, .*; text: a text"),
    "no mark": ([{"text": "just prose"}], r"record 0 .*expected '### Response:' in the text; .*--response_mark"),
    "a hole": ([{"instruction": "a", "output": float("nan")}], r"record 0 .*'output': expected text, found float nan"),
    "half a weight": (
        [{"messages": [CHAT[1], {**CHAT[2], "weight": 0.5}]}], r"messages\[1\], field 'weight': expected 0 or 1, .*0.5",
    ),
    "a weight in quotes": (
        [{"messages": [CHAT[1], {**CHAT[2], "weight": "0"}]}], r"field 'weight': expected 0 or 1, found str '0'",
    ),
    "nothing has weight": (
        [{"messages": [CHAT[1], {**CHAT[2], "weight": 0}]}], r"field 'messages': .*user, assistant \(all of weight 0\)",
    ),
    "turns as text": (
        [{"messages": str(CHAT)}], r"field 'messages': expected a list of turns .*found str .*write it as JSON does",
    ),
    "a call by its role": (
        [{"conversations": [SHAREGPT[1], {"from": "function_call", "value": "{}"}]}], r"\[1\]: calls of tools are not",
    ),
    "an empty conversation": (
        [{"conversations": SHAREGPT}, {"conversations": []}], r"record 1 .*found turns of: nothing; remove the record$",
    ),
    "turns alone": ([CHAT, CHAT], r"record 0 .*found list .*; put the turns under 'messages'"),
    "turns as records": (CHAT, r"record 0 .*\(this is one turn: a record holds all turns of a conversation"),
    "other letters": ([{"Instruction": "a", "Output": "b"}], r"\(is it 'Instruction'\?\)"),
    "columns of two lengths": (
        {"instruction": ["a", "b"], "output": ["c"]}, r"columns of equal length, found instruction: 2, output: 1",
    ),
    "only other splits": ({"test": ALPACA, "valid": ALPACA}, r"found the splits valid, test and no 'train'"),
    "preferences": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], r"one answer .*, found preferences"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_an_example_is_named(tmp_path: Path, kind: str):
    content, message = BAD[kind]
    (tmp_path / "data").write_text(json.dumps(content))
    with pytest.raises(BadExamples, match=message):
        read_data(tmp_path / "data")


MENDABLE: dict[str, tuple[str, str]] = {
    "comma before a bracket": (
        f"[{json.dumps(ALPACA[0])},\n]",
        r"remove the comma before the closing bracket, at line 1",
    ),
    "comma in a record": (
        '[{"instruction": "a",\n "output": "b",}]',
        r"remove the comma before .*, at line 2 column 15",
    ),
    "comma after a line": (
        f"{json.dumps(ALPACA[0])},\n{json.dumps(ALPACA[1])}",
        r"line 1: .*found invalid JSON: Extra",
    ),
    "no comma between": (f"[{json.dumps(ALPACA[0])}\n{json.dumps(ALPACA[1])}]", r"there must be a comma"),
    "comment": ('{"instruction": "a", "output": "b"}\n// half', r"line 2: .*JSON has no comments: remove this one"),
    "line feed in a text": ('[{"instruction": "a\nb"}]', r"inside a text a line feed is written \\n"),
    "column twice": ("instruction,output,output\na,b,c", r"names the column 'output' twice; remove one"),
    "Python's quotes": ("[{'instruction': 'a'}]", r"double quotes: this looks like Python's own notation"),
}


@pytest.mark.parametrize("kind", MENDABLE)
def test_json_faults_say_how_to_mend_them(tmp_path: Path, kind: str):
    text, message = MENDABLE[kind]
    (tmp_path / "data").write_text(text)
    with pytest.raises(BadExamples, match=message):
        read_data(tmp_path / "data")


def test_a_row_of_a_table_with_too_few_fields_is_named(tmp_path: Path):
    (tmp_path / "data").write_text("instruction,output\na,b\nc\n")
    with pytest.raises(BadExamples, match=r"record 1 \(counted from 0, up to line 3\): expected 2 fields .*, found 1"):
        read_data(tmp_path / "data")


def test_packed_files_are_bounded_and_damage_is_named(tmp_path: Path):
    whole = gzip.compress(b'[{"instruction": "a", "output": "' + b"0" * (3 << 20) + b'"}]')
    (tmp_path / "large").write_bytes(whole)
    with pytest.raises(InputError, match=r"large holds more than 2 MiB of data"):
        read_data(tmp_path / "large", most_bytes=2 << 20)
    (tmp_path / "cut").write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"cut is damaged or only a part of a packed file"):
        read_data(tmp_path / "cut")


MISTAKEN: dict[str, tuple[bytes, str]] = {
    "xlsx": (b"PK\x03\x04....", r"zip archive, as Excel's .xlsx is one, too: unpack it"),
    "pickle": (b"\x80\x04\x95....", r"a pickle, and loading one runs code"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", r"`git lfs pull` fetches it"),
    "page": (b"\n<!DOCTYPE html>\n<html>", r"a web page and not data"),
    "tar": (b"\0" * 257 + b"ustar\x0000", r"a tar archive: unpack it"),
    "no mark": ('[{"a": 1}]'.encode("utf-16-le"), r"zero bytes, as UTF-16 text has without its mark; save it as UTF-8"),
}


@pytest.mark.parametrize("kind", MISTAKEN)
def test_files_given_by_mistake_are_named(tmp_path: Path, kind: str):
    content, message = MISTAKEN[kind]
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(BadExamples, match=message):
        read_data(tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "package"), [(b"PAR1....", "pyarrow"), (b"\x28\xb5\x2f\xfd....", "zstandard"), (b"ARROW1", "pyarrow")]
)
def test_missing_packages_are_named(tmp_path: Path, monkeypatch, content: bytes, package: str):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(MissingPackage, match=rf"{package}.*pip install"):
        read_data(tmp_path / "data")


@pytest.mark.parametrize("ending", ["parquet", "arrow", "stream"])
def test_tables_of_arrow(tmp_path: Path, ending: str):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    records = arrow.Table.from_pylist([{"messages": CHAT}] * 3)
    with open(tmp_path / "data", "wb") as file:
        if ending == "parquet":
            pyarrow.parquet.write_table(records, file)
        else:
            make = arrow.ipc.new_file if ending == "arrow" else arrow.ipc.new_stream
            with make(file, records.schema) as writer:
                writer.write_table(records)
    assert read_data(tmp_path / "data")[0] == [CHAT_READ] * 3


def test_zstd(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "data.zst").write_bytes(zstandard.compress(json.dumps(ALPACA).encode()))
    assert read_data(tmp_path / "data.zst")[0] == ALPACA_READ


def test_a_part_of_a_zstd_file_is_no_smaller_file(tmp_path: Path):
    """Its package's readers give what came until then, and say nothing."""
    zstandard = pytest.importorskip("zstandard")
    packed = [zstandard.compress(lines(ALPACA * 500).encode() + b"\n") for _ in range(2)]
    (tmp_path / "data").write_bytes(b"".join(packed))
    assert read_data(tmp_path / "data")[0] == ALPACA_READ * 1000
    for end in (4, len(packed[0]) - 5, len(packed[0]) + 20):
        (tmp_path / "data").write_bytes(b"".join(packed)[:end])
        with pytest.raises(BadExamples, match=r"data is damaged or only a part of a packed file .*frame of zstd"):
            read_data(tmp_path / "data")


def test_the_flag_takes_the_formats_there_are():
    assert DATA_FORMATS == (
        "auto",
        "alpaca",
        "messages",
        "sharegpt",
        "prompt_completion",
        "text",
        "preference",
        "labelled",
    )

"""The prompt that asks for tasks, and what is made of the answer: format, numbers, filters."""

import json
import re
from pathlib import Path

import pytest

from alpaca.data.example import Example
from alpaca.data.generation.prompts import (
    BAD_START,
    BLACKLISTED,
    CUT_OFF,
    EMPTY_OUTPUT,
    MALFORMED,
    MERGED,
    PROGRAM,
    REQUIREMENTS,
    SEED_TASKS,
    TOO_SHORT_OR_LONG,
    encode_prompt,
    find_fault,
    make_prompt,
    parse_completion,
    read_seed_tasks,
    strip_repeated_label,
)
from alpaca.data.generation.similarity import InstructionPool
from alpaca.errors import InputError, MissingInput

# Seed tasks -----------------------------------------------------------------------------------------------------


def test_own_seed_tasks_are_sound():
    records = [json.loads(line) for line in SEED_TASKS.read_text("utf-8").splitlines()]
    assert all({*record} == {"id", "name", "instruction", "instances", "is_classification"} for record in records)
    assert len(records) == 40
    assert all(len({record[key] for record in records}) == 40 for key in ("id", "name", "instruction"))
    assert 5 <= sum(record["is_classification"] for record in records) <= 10
    tasks = read_seed_tasks(SEED_TASKS)
    assert not [task for task in tasks if find_fault(task)]
    assert len({task.instruction.split()[0] for task in tasks}) >= 30, "the requirements ask for different verbs"
    pool = InstructionPool()
    for task in tasks:
        assert pool.find_similar(task.instruction, 0.5) is None
        pool.add(task.instruction)


def test_self_instructs_seed_tasks_are_read(real: Path):
    tasks = read_seed_tasks(real / "seed_tasks.jsonl")
    lines = [json.loads(line) for line in (real / "seed_tasks.jsonl").read_text("utf-8").split("\n") if line]
    assert len(tasks) == len(lines) == 175
    assert [(t.instruction, t.input, t.output) for t in tasks] == [
        (line["instruction"], line["instances"][0]["input"], line["instances"][0]["output"]) for line in lines
    ]
    own = {task.instruction for task in read_seed_tasks(SEED_TASKS)}
    assert not own & {task.instruction for task in tasks}
    assert "### " not in make_prompt(tasks, number=0, num_prompt_instructions=3, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no seed tasks; expected a JSON object on each line"),
        ("{", "line 1: expected a seed task as JSON"),
        ('{"instruction": "a"}', r'line 1: expected \{"instruction": text, "instances": .* found \{\'instruction'),
        ('\n{"instruction": "a", "instances": []}', "line 2: expected"),
        ('{"instruction": "a", "instances": [{"input": 1, "output": "b"}]}', "line 1: expected"),
        ("[1]", "line 1: expected"),
    ],
)
def test_bad_seed_tasks_name_the_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "seeds.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_seed_tasks(path)


def test_missing_seed_tasks_are_named(tmp_path: Path):
    with pytest.raises(MissingInput, match=r"no seed tasks at .*none.jsonl .*leave out --seed_tasks_path"):
        read_seed_tasks(tmp_path / "none.jsonl")


# The prompt -----------------------------------------------------------------------------------------------------


def test_requirements_are_numbered_throughout():
    assert [int(number) for number in re.findall(r"^(\d+)\. ", REQUIREMENTS, re.MULTILINE)] == [*range(1, 10)]
    assert REQUIREMENTS.endswith("List of 20 tasks:\n")


def test_tasks_are_laid_out_as_the_original_does():
    tasks = [Example(" Name  a\ncolour: ", "Red.\nBlue."), Example("Add.", "3", "1 + 2\n")]
    assert encode_prompt(tasks) == REQUIREMENTS + (
        "###\n1. Instruction: Name a colour\n1. Input:\n<noinput>\n1. Output:\nRed.\nBlue.\n"
        "###\n2. Instruction: Add.\n2. Input:\n1 + 2\n\n2. Output:\n3\n"
        "###\n3. Instruction:"
    )


def test_prompts_depend_on_seed_and_number_alone():
    tasks = read_seed_tasks(SEED_TASKS)

    def prompts(seed: int) -> list[str]:
        return [make_prompt(tasks, number=number, num_prompt_instructions=3, seed=seed) for number in range(50)]

    assert prompts(1) == prompts(1)
    assert len({*prompts(1), *prompts(2)}) == 100
    shown = {line for prompt in prompts(1) for line in re.findall(r"^\d+\. Instruction: (.*)", prompt, re.MULTILINE)}
    assert len(shown) == 40, "every seed task has its turn"


@pytest.mark.parametrize("count", [0, 20, 41])
def test_a_prompt_shows_as_many_as_there_are(count: int):
    tasks = read_seed_tasks(SEED_TASKS)
    with pytest.raises(InputError, match=r"--num_prompt_instructions \d+: expected a number from 1 to 19 .*40 seed"):
        make_prompt(tasks, number=0, num_prompt_instructions=count, seed=0)


# The completion -------------------------------------------------------------------------------------------------


def block(number: int, instruction: str, input: str = "<noinput>", output: str = "An answer.") -> str:
    return f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{input}\n{number}. Output:\n{output}\n"


def completion(*blocks: str) -> str:
    """Blocks of which the first one's label was the prompt's end."""
    return "".join(blocks).split("Instruction:", 1)[1]


def parse(text: str, *, is_cut: bool = False) -> list[Example | str]:
    return [found.task or found.rejection for found in parse_completion(text, first_number=4, is_cut=is_cut)]


def test_blocks_become_tasks():
    text = completion(
        block(4, "Name a colour."), block(5, "Add.", "1\n2", "3\n\n"), block(6, "Say it.", "<NoInput>", "  It.  ")
    )
    expected = [Example("Name a colour.", "An answer."), Example("Add.", "3", "1\n2"), Example("Say it.", "It.")]
    assert parse(text) == expected
    assert parse(text + "###\n") == expected, "what follows the last mark is nobody's"
    assert parse(text, is_cut=True) == [*expected[:2], CUT_OFF]
    assert parse(text + "###", is_cut=True) == [*expected, CUT_OFF]


def test_an_answer_to_a_prompt_is_its_own_format():
    tasks = read_seed_tasks(SEED_TASKS)[:6]
    written = encode_prompt(tasks).removeprefix(REQUIREMENTS).split("###\n4. Instruction:")[1]
    expected = [(" ".join(task.instruction.split()).rstrip(":"), task.input, task.output) for task in tasks[3:]]
    found = parse_completion(written, first_number=4, is_cut=False)
    assert [(c.task.instruction, c.task.input, c.task.output) for c in found[:3]] == expected
    assert [c.rejection for c in found[3:]] == [MALFORMED]


@pytest.mark.parametrize(
    "bad",
    [
        block(6, "Wrong number."),
        "###\n5. Instruction: No output.\n5. Input:\nx\n",
        "###\n5. Instruction: Two.\n5. Input:\nx\n5. Output:\ny\n5. Output:\nz\n",
        "###\n5.Instruction: No space.\n5.Input:\nx\n5.Output:\ny\n",
        "###\nInstruction: No number.\nInput:\nx\nOutput:\ny\n",
        "###\nnonsense\n",
        block(5, "Surrogate.", output="\ud800"),
    ],
)
def test_a_misnumbered_or_broken_block_is_skipped_and_its_neighbours_kept(bad: str):
    text = completion(block(4, "Before."), bad, block(6, "After."))
    assert parse(text) == [Example("Before.", "An answer."), MALFORMED, Example("After.", "An answer.")]


def test_nonsense_is_no_task():
    for text in ("", " ", "\n\n###\n###", "Once upon a time", "###" * 30, "\x00\ud800"):
        assert not [found for found in parse(text) if isinstance(found, Example)]


@pytest.mark.parametrize("start", ["### 4. Instruction:", "\n4. Instruction:", "###\n4.  Instruction:"])
def test_a_chat_reply_may_repeat_the_label(start: str):
    text = completion(block(4, "Name a colour."))
    assert strip_repeated_label(start + text, first_number=4) == text
    assert strip_repeated_label(text, first_number=4) == text


# Filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "fault"),
    [
        ("Name three colours", TOO_SHORT_OR_LONG), ("Name three warm colours", ""), ("", TOO_SHORT_OR_LONG),
        ("word " * 150, ""), ("word " * 151, TOO_SHORT_OR_LONG),
        ("Describe the IMAGES you see", BLACKLISTED), ("Read the file, then answer", BLACKLISTED),
        ("Say how to go to school", BLACKLISTED), ("Say how to go  to school", ""),
        ("Add a flowchart to it", BLACKLISTED),
        ("Imagine a filed profile of photography", ""), ("Explain the plotting of mapped imagery", ""),
        ("Write a program that adds numbers", PROGRAM), ("Write a programme for the evening", PROGRAM),
        ("Please write a program that adds", ""), ("write a program that adds numbers", ""),
        ("\"Quote\" this for me please", BAD_START), ("- Name three warm colours", BAD_START),
        ("Élise asks for three colours", BAD_START), ("请 name three warm colours", BAD_START),
        ("3 colours that are warm", ""), ("Name the colour é in French", ""),
    ],
)  # fmt: skip
def test_filters_of_the_original(instruction: str, fault: str):
    for original in (True, False):
        assert find_fault(Example(instruction, "An answer."), original_filters=original) == fault


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        (Example("Name three warm colours", "  "), EMPTY_OUTPUT),
        (Example("Name three warm colours", "Red.\n15. Instruction: Name a fish."), MERGED),
        (Example("Name three warm colours", "Red.", "x\n 7. Output: y"), MERGED),
        (Example("Name three warm colours", "1. Input: the first step\nis input"), MERGED),
        (Example("Name three warm colours", "Step 1. Input: none"), ""),
    ],
)
def test_filters_beyond_the_originals(task: Example, fault: str):
    assert find_fault(task) == fault
    assert find_fault(task, original_filters=True) == ""

"""From seed tasks to a prompt that asks a model for more, and from its completion to new tasks.

Format, order of the steps and filters: tatsu-lab/stanford_alpaca, generate_instruction.py. The requirements say what
its prompt.txt says, in words of our own and numbered 1 to 9; the published file counts 1, 2, 3, 2, 3, 4, 5, 6, 7.
"""

import json
import random
import re
import reprlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alpaca.data.example import Example
from alpaca.errors import InputError, MissingInput
from alpaca.files.reading import list_folder

NUM_TASKS = 20  # in the list that the prompt begins and the model is to finish
NO_INPUT = "<noinput>"
SEED_TASKS = Path(__file__).with_name("seed_tasks.jsonl")
# The original also stops at "20." anywhere, which ends a text at "in 2020.".
STOP = f"\n{NUM_TASKS}. Instruction:"

REQUIREMENTS = f"""\
Write a varied list of {NUM_TASKS} tasks. Each will be handed to a text-only assistant, and its answer will be compared with yours.

Keep to these rules:
1. Begin the tasks with different verbs as far as you can, so that no two ask for the same kind of act.
2. Vary the wording as well: some tasks are orders, others are questions.
3. Cover many kinds of work: open writing, reasoning, classification, rewriting, extraction, advice, and so on.
4. Ask only for what a language model can do in text. It can neither see nor make pictures or sound, and it cannot act in the world: it sets no alarms and sends no mail.
5. Use English.
6. Keep each instruction to one or two sentences, as a command or a question.
7. Where a task works on something, give that as its input: a concrete and lifelike example rather than a placeholder, of some substance but no more than 100 words.
8. Not every task needs an input. Where the instruction says all there is to say, write "{NO_INPUT}" as the input.
9. The output is a correct and fitting answer to the instruction and its input, in fewer than 100 words.

List of {NUM_TASKS} tasks:
"""  # noqa: E501

TOO_SHORT_OR_LONG = "length"
BLACKLISTED = "not for a text model"
PROGRAM = "write a program"
BAD_START = "first character"
MALFORMED = "malformed"
CUT_OFF = "cut off"
EMPTY_OUTPUT = "empty output"
MERGED = "merged tasks"
_BLACKLIST = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
_BLACKLISTED = re.compile(rf"\b({'|'.join(_BLACKLIST)})\b", re.IGNORECASE)
_LABEL = re.compile(r"(?:^|\n)\s*\d+\.\s*(Instruction|Input|Output):")


# Seed tasks -----------------------------------------------------------------------------------------------------


def read_seed_tasks(path: str | Path) -> list[Example]:
    """Read the tasks of a file in Self-Instruct's format: a JSON object on each line, whose first instance is used.

    Raises MissingInput, and InputError that names the line and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInput(
            f"no seed tasks at {path} (found in {path.parent}: {list_folder(path.parent)}); "
            "leave out --seed_tasks_path for this project's own"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    tasks = [_read_seed_task(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not tasks:
        raise InputError(f"{path} holds no seed tasks; expected a JSON object on each line")
    return tasks


def _read_seed_task(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: expected a seed task as JSON, found {error}") from error
    try:
        first = record["instances"][0]
        fields = (record["instruction"], first["input"], first["output"])
    except (TypeError, LookupError):
        fields = ()
    if not fields or not all(isinstance(field, str) for field in fields):
        raise InputError(
            f'{where}: expected {{"instruction": text, "instances": [{{"input": text, "output": text}}]}}, '
            f"found {reprlib.repr(record)}"
        )
    instruction, input_text, output = fields
    return Example(instruction, output, input_text)


# The prompt -----------------------------------------------------------------------------------------------------


def make_prompt(tasks: Sequence[Example], *, number: int, num_prompt_instructions: int, seed: int) -> str:
    """Make prompt `number` of a run. It depends only on the tasks, the counts and the seed, not on earlier prompts.

    Raises InputError when there are fewer tasks than a prompt shows, or it would leave none to write.
    """
    if not 1 <= num_prompt_instructions <= min(len(tasks), NUM_TASKS - 1):
        raise InputError(
            f"--num_prompt_instructions {num_prompt_instructions}: expected a number from 1 to "
            f"{min(len(tasks), NUM_TASKS - 1)} (there are {len(tasks)} seed tasks, and a list has {NUM_TASKS})"
        )
    return encode_prompt(random.Random(f"{seed}-{number}").sample(tasks, num_prompt_instructions))


def encode_prompt(tasks: Sequence[Example]) -> str:
    """The requirements, `tasks` as the first of the list, and the label of the next one's instruction."""
    blocks = [_encode_task(number, task) for number, task in enumerate(tasks, start=1)]
    return REQUIREMENTS + "".join(blocks) + f"###\n{len(tasks) + 1}. Instruction:"


def _encode_task(number: int, task: Example) -> str:
    instruction = re.sub(r"\s+", " ", task.instruction).strip().rstrip(":")
    input_text = task.input or NO_INPUT
    return (
        f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{input_text}\n{number}. Output:\n{task.output}\n"
    )


# The completion -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One block of a completion: a task, or the reason why it holds none."""

    task: Example | None
    rejection: str = ""


def parse_completion(text: str, *, first_number: int, is_cut: bool) -> list[Candidate]:
    """The blocks of a completion that goes on after "`first_number`. Instruction:", each a task or a reason against it.

    is_cut: the model ran out of tokens, so that the last block may end in the middle.
    Blocks are counted from `first_number`; one that carries another number, or lacks a label, is skipped. A block of
    white space alone is nobody's and not reported.
    """
    blocks = re.split("###", f"{first_number}. Instruction:" + text)
    candidates = []
    for number, block in enumerate(blocks, start=first_number):
        if is_cut and number - first_number == len(blocks) - 1:
            candidates.append(Candidate(task=None, rejection=CUT_OFF))
        elif block.strip():
            candidates.append(_parse_block(block, number))
    return candidates


def _parse_block(block: str, number: int) -> Candidate:
    parts = re.split(rf"{number}\.\s+(Instruction|Input|Output):", block)
    if len(parts) != 7:
        return Candidate(task=None, rejection=MALFORMED)
    if re.search(r"[\ud800-\udfff]", block):  # JSON can spell a lone surrogate, no file and no tokenizer takes it
        return Candidate(task=None, rejection=MALFORMED)
    instruction, input_text, output = (parts[index].strip() for index in (2, 4, 6))
    if input_text.lower() == NO_INPUT:
        input_text = ""
    return Candidate(task=Example(instruction, output, input_text))


def strip_repeated_label(text: str, *, first_number: int) -> str:
    """A chat model's reply without the label that the prompt ended with, which it likes to repeat."""
    return re.sub(rf"\A\s*(?:###\s*)?{first_number}\.\s*Instruction:", "", text)


# Filters --------------------------------------------------------------------------------------------------------


def find_fault(task: Example, *, original_filters: bool = False) -> str:
    """Why a task is not fit for the data, "" when it is.

    original_filters: look at the instruction alone, as the original does. Otherwise an empty output, and a text in
    which the labels of another task stand, are faults, too.
    """
    return _instruction_fault(task.instruction) or ("" if original_filters else _text_fault(task))


def _instruction_fault(instruction: str) -> str:
    if not 3 < len(instruction.split()) <= 150:
        return TOO_SHORT_OR_LONG
    if _BLACKLISTED.search(instruction):
        return BLACKLISTED
    if instruction.startswith("Write a program"):  # models tend to, without saying whether output or code is wanted
        return PROGRAM
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return BAD_START
    return ""


def _text_fault(task: Example) -> str:
    if not task.output.strip():
        return EMPTY_OUTPUT
    if any(_LABEL.search(text) for text in (task.instruction, task.input, task.output)):
        return MERGED
    return ""

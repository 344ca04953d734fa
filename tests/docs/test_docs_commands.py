"""Each command on the project's pages is one that its program takes, or stands in a short list with the reason.

What is asked of a server (`curl`, Python) runs in tests/test_readme_calls.py, whatever page it stands on.
"""

import ast
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.pages import all_blocks, fenced_commands, inline_commands, inline_flags, named_files, split_commands
from tests.processes import run_command

# Commands that no test can run here, by how they begin, and why.
CANNOT_RUN = {
    "cog login": "asks Replicate, over the network",
    "cog push": "needs Docker and Replicate",
    "cog build": "needs Docker",
    "cog predict": "needs Docker; script/predict does the same without and is held",
    "docker run": "needs Docker",
    "pip install": "needs the network; what it names is held to pyproject.toml",
    "script/bench_gpu": "needs a GPU",
    "script/test": "runs the tests, this one among them",
    "script/setup": "makes the environment the tests run in; tests/test_scripts.py runs it in a copy",
    "lm_eval": "asks a server; tests/web/openai/test_real_clients.py does the same and is held",
    "python -c": "asks a server by langchain; tests/web/openai/test_real_clients.py does the same and is held",
    "script/demo": "takes no arguments; tests/test_scripts.py runs it whole",
}
# How a fenced block of each language is held.
LANGUAGES = {
    "sh": "test_programs_take_the_commands, or tests/test_readme_calls.py",
    "python": "tests/test_readme_calls.py",
    "yaml": "tests/test_readme_calls.py",
    "js": "tests/web/openai/test_real_clients.py, by a script of its own",
    "text": "test_the_log_line_is_the_engines",
    "mermaid": "drawings: tests/docs/test_architecture.py holds the names in them",
}
# Commands that are wrong, and what is said against them.
WRONG = {
    "python -m convert.export_gguf --output_dir x": "required: --output_file",
    "python -m convert.weight_diff recover --path_raw a --path_difference b": "required: --path_diff",
    "python -m convert.no_such_command --x 1": "No module named convert.no_such_command",
    "script/serve --weight a --concurrency many": "argument --concurrency: invalid int value: 'many'",
    "script/predict --no_such_setting 1": "unrecognized arguments: --no_such_setting 1",
    "torchrun --nproc_per_gpu=4 train.py --data_path d": "nproc_per_gpu|required: training_script",
    "python train.py --model_name_or_path m --data_path d --fp16 True": "--fp16",
    "python train.py --model_name_or_path m --data_path d --learning_rat 1": "learning_rat",
}
Program = tuple[str, list[str]]


def programs_of(words: list[str]) -> list[Program]:
    """The programs that a command starts, outermost first, each a module or file with its arguments.

    Raises LookupError for a command that no test covers.
    """
    if words[:2] == ["cog", "exec"]:
        return programs_of(words[2:])
    name = words[0].removeprefix(".venv/bin/")
    is_listed = " ".join(words[:2]) in CANNOT_RUN or name in CANNOT_RUN
    if is_listed or name == "curl" or words[1:3] == ["-m", "pytest"]:  # pytest's paths: test_named_scripts_…_exist
        return []
    if name in ("python", "torchrun") and len(words) == 1:  # how commands begin, in a sentence
        return []
    if name == "torchrun":
        at = words.index("train.py")
        return [(name, words[1:]), ("train.py", words[at + 1 :])]
    if name == "python":
        return [(words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])]
    if name == "train.py":
        return [(name, words[1:])]
    if name.startswith("script/"):
        return [(started_by(name), words[1:])]
    raise LookupError(f"no test covers the command {words}; make one cover it, or name the reason in CANNOT_RUN")


def started_by(script: str) -> str:
    """What a shell script of ours leaves its arguments to."""
    found = re.search(r"^exec \.venv/bin/python (?:-m )?(\S+) \"\$@\"$", (ROOT / script).read_text(), re.MULTILINE)
    if not found:
        raise LookupError(f'{script} has no line exec .venv/bin/python … "$@": a test must cover it in another way')
    return found[1]


@cache
def documented() -> list[tuple[str, list[str]]]:
    return [*fenced_commands(), *inline_commands()]


@dataclass(frozen=True)
class Parsed:
    """What the programs' own parsers said of the pages' commands and of the wrong ones; None: nothing against them."""

    programs: list[tuple[str, Program]]  # with their places
    of_pages: list[str | None]
    of_wrong: list[str | None]
    flags: set[str]


@cache
def parsed() -> Parsed:
    """One process (parse_commands.py) for all programs, as their imports take seconds."""
    programs = [(place, program) for place, words in documented() for program in programs_of(words)]
    asked = [*(program for _, program in programs), *(programs_of(words.split())[0] for words in WRONG)]
    with tempfile.TemporaryDirectory() as folder:  # as if the real inputs, which the project does not ship, were there
        for name in ("llama-tokenizer/tokenizer.model", "alpaca_4000.json"):
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).touch()
        (Path(folder) / "asked.json").write_text(json.dumps(asked))
        command = [sys.executable, "-m", "tests.docs.parse_commands", str(Path(folder) / "asked.json")]
        done = run_command(command, ALPACA_REAL=folder)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return Parsed(
        programs=programs,
        of_pages=said["errors"][: len(programs)],
        of_wrong=said["errors"][len(programs) :],
        flags={flag for flags in said["options"].values() for flag in flags},
    )


def test_every_block_is_of_a_language_that_is_held():
    assert {block.place: block.language for block in all_blocks() if block.language not in LANGUAGES} == {}


def test_programs_take_the_commands():
    programs, errors = parsed().programs, parsed().of_pages
    said = [f"{place}: {program}: {error}" for (place, program), error in zip(programs, errors, strict=True) if error]
    assert said == []
    assert {"train.py", "torchrun", "alpaca.serving.plan", "bench.plot_serving", "web"} <= {p[0] for _, p in programs}


def test_flags_in_running_text_exist():
    named = set(inline_flags())
    assert len(named) > 50
    assert {(place, flag) for place, flag in named if flag not in parsed().flags} == set()


def test_a_wrong_command_is_found():
    for words, error in zip(WRONG, parsed().of_wrong, strict=True):
        assert error is not None, words
        assert re.search(WRONG[words], error), error


@pytest.mark.parametrize("command", ["make all", "npm start", "cog train -i x=1", "script/check_everything --now"])
def test_a_command_that_no_test_covers_is_found(command):
    with pytest.raises((LookupError, FileNotFoundError), match=r"no test covers the command|No such file"):
        programs_of(command.split())


def test_the_list_of_what_cannot_run_has_nothing_to_spare():
    beginnings = {" ".join(words[:count]) for _, words in fenced_commands() for count in (1, 2)}
    assert [beginning for beginning in CANNOT_RUN if beginning not in beginnings] == []


def test_commands_are_split_as_a_shell_does():
    text = "# first\na --b 'c d' \\\n  e  # f\ncurl -d '{\"x\":\n   1}'\n"
    assert list(split_commands(text)) == [["a", "--b", "c d", "e"], ["curl", "-d", '{"x":\n   1}']]


def test_what_pip_installs_is_what_the_project_pins():
    text = (ROOT / "pyproject.toml").read_text().partition("[dependency-groups]")[2].partition("\n[")[0]
    groups = {name: ast.literal_eval(list_) for name, list_ in re.findall(r"^(\w+) = (\[.*?\])", text, re.M | re.S)}
    pinned = {requirement for group in groups.values() for requirement in group}
    pinned |= set((ROOT / "requirements.txt").read_text().split())
    names = {re.split(r"[=>;]", requirement)[0] for requirement in pinned}
    asked = [words[2:] for _, words in documented() if words[:2] == ["pip", "install"]]
    assert asked
    for words in asked:
        if words[0] == "--group":
            assert words[1] in groups, words
        else:
            assert words[0] in pinned if "==" in words[0] else words[0] in names, words


def test_inputs_of_a_prediction_exist():
    from alpaca.serving.request import PredictionInputs

    commands = [
        words for _, words in documented() if words[:2] == ["cog", "predict"] or "local_predict" in " ".join(words)
    ]
    given = [words[i + 1].split("=")[0] for words in commands for i, word in enumerate(words) if word == "-i"]
    assert len(given) > 1
    assert set(given) <= set(PredictionInputs.__dataclass_fields__)


def test_named_scripts_and_tests_exist():
    assert {(place, name) for place, name in named_files() if not (ROOT / name).exists()} == set()


def test_named_test_files_exist():
    """The table of troubleshooting names a test file for each line."""
    names = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "troubleshooting.md").read_text()))
    assert len(names) > 5
    assert names <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_the_log_line_is_the_engines():
    (block,) = (block for block in all_blocks("text") if block.text.startswith("engine:"))
    line = re.sub(r"[\d.]+\d|\d", "#", block.text.strip())
    written = {
        re.sub(r"%(?:d|\.1f)", "#", text)
        for path in (ROOT / "alpaca" / "serving").rglob("*.py")
        for text in re.findall(r'"(engine: running [^"]*)"', path.read_text())
    }
    assert line in written


def test_the_family_shown_is_the_tables():
    """The rows that CONTRIBUTING.md shows stand so in their files, but for line breaks."""
    (block,) = (block for block in all_blocks("text") if block.place.startswith("CONTRIBUTING.md"))
    files = (
        "alpaca/architecture/families.py",
        "tests/serving/llama/families.py",
        "tests/architecture/test_description.py",
    )
    rows = re.findall(r'^".*?(?=^"|\Z)', block.text, flags=re.DOTALL | re.MULTILINE)
    assert len(rows) == len(files)
    for row, file in zip(rows, files, strict=True):
        assert squeeze(row) in squeeze((ROOT / file).read_text())


def squeeze(code: str) -> str:
    """Code without white space and the commas before closing brackets."""
    return re.sub(r",(?=[)}\]])", "", re.sub(r"\s", "", code))

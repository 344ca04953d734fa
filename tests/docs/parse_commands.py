"""Run programs just as far as their own parser, and say what it thinks of the arguments: a process of its own.

Its argument is a JSON file, a list of [module or file, arguments]; the last line of the output is
{"errors": [text or null], "options": {module or file: flags}}. A program is started as Python starts it, so where its
parser lives does not matter.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
read_known = argparse.ArgumentParser.parse_known_args
# `script/predict` leaves what it does not know to `script/serve`.
REST_GOES_TO = {"deploy.local_predict": "deploy.serve"}


class ParsedError(BaseException):
    """The parser is done: nothing of the program shall run after it."""

    def __init__(self, parser: argparse.ArgumentParser, unknown: list[str]) -> None:
        super().__init__()
        self.options = flags_of(parser)
        self.unknown = unknown


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= {flag for one in action.choices.values() for flag in flags_of(one)}
    return flags


def stop_after_parsing() -> None:
    """From now on the outermost parser raises ParsedError once it has read its arguments."""
    is_reading = False

    def parse(parser, args=None, namespace=None):
        nonlocal is_reading
        if is_reading:  # a command's parser below the program's
            return read_known(parser, args, namespace)
        is_reading = True
        try:
            _, unknown = read_known(parser, args, namespace)
        finally:
            is_reading = False
        raise ParsedError(parser, unknown)

    argparse.ArgumentParser.parse_known_args = parse


def try_arguments(target: str, arguments: list[str], options: dict[str, list[str]]) -> str | None:
    """What the program says against its arguments; None where it takes them."""
    sys.argv = [target, *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            start(target)
    except ParsedError as parsed:
        options[target] = sorted({*options.get(target, ()), *parsed.options})
        if parsed.unknown and target in REST_GOES_TO:
            return try_arguments(REST_GOES_TO[target], parsed.unknown, options)
        return (
            f"unrecognized arguments: {' '.join(parsed.unknown)}" if parsed.unknown else check_values(target, arguments)
        )
    except SystemExit as end:
        return None if end.code in (0, None) else f"{said.getvalue()} {end.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it ended without reading its arguments"


def start(target: str) -> None:
    if target == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(sys.argv[1:])
    elif target.endswith(".py"):
        runpy.run_path(str(ROOT / target), run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def check_values(target: str, arguments: list[str]) -> str | None:
    """train.py knows flags in order to refuse them, and flags that contradict each other."""
    if target != "train.py":
        return None
    from alpaca.errors import InputError

    found = re.search(r"from (alpaca[\w.]*) import parse_flags", (ROOT / target).read_text())
    if not found:
        return "train.py imports no parse_flags: this test must learn how it reads its flags"
    parse_flags = importlib.import_module(found[1]).parse_flags
    stopping: Callable = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = read_known
    try:
        parse_flags(arguments)
    except InputError as error:
        return str(error)
    finally:
        argparse.ArgumentParser.parse_known_args = stopping
    return None


def main() -> None:
    commands = json.loads(Path(sys.argv[1]).read_text())
    stop_after_parsing()
    options: dict[str, list[str]] = {}
    errors = [try_arguments(target, arguments, options) for target, arguments in commands]
    print(json.dumps({"errors": errors, "options": options}))


if __name__ == "__main__":
    main()

"""`--config FILE`: flags from a YAML or JSON file, of which the `train_config.json` of an earlier run is one."""

import re
from collections.abc import Sequence
from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.names import quote_value

_NO_FLAGS = ("base_fingerprint",)  # what train_config.json holds besides
_FLAG = re.compile(r"--([A-Za-z]\w*)")


def take_config(arguments: Sequence[str]) -> list[str]:
    """The command line with what `--config FILE` holds in its place. What else the line says goes over the file.

    Raises InputError for a file that cannot be read or holds anything but names and plain values.
    """
    found, rest = _split(arguments)
    if found is None:
        return rest
    given = {match[1] for argument in rest if (match := _FLAG.match(argument))}
    return [*_as_arguments(_read(Path(found)), found, given), *rest]


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    rest = list(arguments)
    for place, argument in enumerate(rest):
        if argument.startswith("--config="):
            return argument.partition("=")[2], rest[:place] + rest[place + 1 :]
        if argument == "--config":
            if place + 1 == len(rest):
                raise InputError("--config: expected a YAML or JSON file, found nothing")
            return rest[place + 1], rest[:place] + rest[place + 2 :]
    return None, rest


def _read(file: Path) -> dict[str, object]:
    import yaml  # reads JSON as well

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {file} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"--config {file}: expected flags' names and their values; found {quote_value(values)}")
    return values


def _as_arguments(values: dict[str, object], file: str, given: set[str]) -> list[str]:
    """Flags as a command line has them. A null is a flag that is not given; a list, a flag given more than once."""
    arguments = []
    for name, value in values.items():
        name = name.lstrip("-").replace("-", "_")
        if name in given or name in _NO_FLAGS or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str | int | float):  # bool is an int
                raise InputError(f"--config {file}, {name}: expected a plain value, found {quote_value(one)}")
            arguments.append(f"--{name}={one}")
    return arguments

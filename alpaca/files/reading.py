"""Small files and texts, read with errors that say what was found."""

import json
import re
from pathlib import Path

from alpaca.errors import InputError, MissingInput


def read_json(path: str | Path) -> dict:
    """Read a JSON object. Raises MissingInput without the file, InputError for other content; both name the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInput(f"{path} is missing; found there: {list_folder(Path(path).parent)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_json_if_any(path: Path) -> dict:
    """Read a JSON object, empty where there is no such file. Raises InputError for other content."""
    return read_json(path) if path.is_file() else {}


def list_folder(path: Path, most: int = 12) -> str:
    """The names in a folder, for an error message; at most `most` of them."""
    if not path.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:most]) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def parse_size(text: str) -> int:
    """Bytes of "5GB", "400MB", "300KB" (powers of ten, as Hugging Face reads them), "2GiB" or a plain number."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in units or float(match[1]) <= 0:
        raise InputError(f'expected a size such as "5GB" or "400MB", found {text!r}')
    return int(float(match[1]) * units[match[2].upper()])

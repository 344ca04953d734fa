"""Finds the chat template of a model's folder, where transformers looks for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.errors import InputError
from alpaca.files.reading import read_json_if_any

TEMPLATE_FILE = "chat_template.jinja"
_KNOWN = Path(__file__).parent / "templates"
_CONFIG_FILE = "tokenizer_config.json"
_DEFAULT = "default"


@dataclass(frozen=True)
class ChatTemplate:
    """source: the template itself, in Jinja2.   file: where it was found."""

    source: str
    file: Path


def known_template(name: str) -> ChatTemplate:
    """One of the formats of conversations that come with this program: llama2, llama3, chatml."""
    file = _KNOWN / f"{name}.jinja"
    return ChatTemplate(file.read_text(encoding="utf-8"), file)


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The folder's chat template; None without one, or where none of several is the default one.

    chat_template.jinja counts before tokenizer_config.json, which has a text or a list of named ones. Raises InputError
    for anything else.
    """
    own, config = folder / TEMPLATE_FILE, folder / _CONFIG_FILE
    if own.is_file():
        try:
            return ChatTemplate(own.read_text(encoding="utf-8"), own)
        except UnicodeDecodeError as error:
            raise InputError(f"{own} is not text in UTF-8: {error}") from error
    value = read_json_if_any(config).get("chat_template")
    source = value if isinstance(value, str | None) else _find_default(value, config)
    return None if source is None else ChatTemplate(source, config)


def _find_default(value: Any, file: Path) -> str | None:
    named = value
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(named, dict) or not all(isinstance(text, str) for item in named.items() for text in item):
        raise InputError(
            f"{file}: expected chat_template to be a text, or a list of objects with `name` and `template`; found "
            f"{str(value)[:80]!r}. Correct it, or remove the field"
        )
    return named.get(_DEFAULT)

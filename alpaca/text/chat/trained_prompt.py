"""The prompt that a model was trained with, as train.py writes it beside the weights and the server reads it."""

from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.atomic import write_json
from alpaca.files.names import quote_value
from alpaca.files.reading import read_json_if_any
from alpaca.text.prompts import NAMED_TEMPLATES

PROMPT_FILE = "prompt_template.json"
CHAT = "chat"  # the model's chat template, the prompt being a user's only message
_KEY = "prompt_template"


def read_trained_prompt(folder: Path) -> str | None:
    """A prompt template's name, its text, or CHAT; None where the folder does not say. Raises InputError."""
    file = folder / PROMPT_FILE
    value = read_json_if_any(file).get(_KEY)
    known = (*NAMED_TEMPLATES, CHAT)
    if value is None or (isinstance(value, str) and (value in known or "{prompt}" in value)):
        return value
    raise InputError(
        f"{file}: expected {_KEY} to be {', '.join(known)}, or a text that holds {{prompt}}; found {quote_value(value)}"
    )


def write_trained_prompt(folder: Path, template: str) -> None:
    """Write what `read_trained_prompt` gives."""
    write_json(folder / PROMPT_FILE, {_KEY: template})

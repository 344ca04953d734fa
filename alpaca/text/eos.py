"""The ids that end an answer, as a folder's configs name them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alpaca.errors import InputError
from alpaca.files.reading import read_json
from alpaca.text.tokenizer import Tokenizer

_FILES = ("generation_config.json", "config.json")


def read_eos_ids(folder: Path, tokenizer: Tokenizer, *, vocab_size: int) -> frozenset[int]:
    """The EOS ids: the tokenizer's, and those of the folder's configs unless these are known to be wrong.

    Ids that the model has no row for are left out. Raises InputError for a value that is no id.
    """
    named = {*tokenizer.end_ids}
    for file in _FILES:
        for content in _parts(folder / file):
            named |= set(_without_mistakes(folder / file, content, tokenizer))
    return frozenset(token_id for token_id in named if 0 <= token_id < vocab_size)


def first_eos_id(folder: Path) -> int | None:
    """The first EOS id that a config names, for a tokenizer that names none. Raises InputError as above."""
    ids = (i for file in _FILES for content in _parts(folder / file) for i in _ids(folder / file, content, "eos"))
    return next(ids, None)


def _parts(file: Path) -> Iterator[Mapping[str, Any]]:
    """A config, and the part of it that describes the language model where there are others, too."""
    if file.is_file():
        content = read_json(file)
        yield content
        if isinstance(content.get("text_config"), dict):
            yield content["text_config"]


def _without_mistakes(file: Path, content: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The EOS ids of a config. LLaMA's early conversions named <unk>, id 0, as BOS, and it or the real BOS as EOS."""
    ids = [token_id for token_id in _ids(file, content, "eos") if not tokenizer.is_unknown(token_id)]
    if any(map(tokenizer.is_unknown, _ids(file, content, "bos"))):
        ids = [token_id for token_id in ids if token_id != tokenizer.bos_id]
    return ids


def _ids(file: Path, content: Mapping[str, Any], name: str) -> list[int]:
    value = content.get(f"{name}_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise InputError(
            f"{file}: expected {name}_token_id to be a whole number, a list of whole numbers, or null; found "
            f"{value!r}. Write the id as a number, without quotes"
        )
    return [token_id for token_id in ids if token_id >= 0]  # -1 stands for none

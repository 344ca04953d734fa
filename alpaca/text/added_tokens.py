"""What a folder's files say of tokens beyond the model's own vocabulary, and of the special ones.

Four files may say it, and older and newer tools write different ones. Which one holds is AutoTokenizer's rule
(transformers 5.17): an `added_tokens_decoder` in tokenizer_config.json replaces added_tokens.json and
special_tokens_map.json; without it these two count, and tokenizer.json's list before them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.errors import InputError
from alpaca.files.reading import read_json_if_any

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FURTHER = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is found in a text before anything else.

    special: stands for no text, and is no token where a user writes its name.   lstrip, rstrip: it takes the white
    space before or after it along.   single_word: not inside a word.   normalized: looked for in the normalized text.
    """

    token_id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True, kw_only=True)
class SpecialNames:
    """The special tokens that a folder names.

    roles: by role ("eos_token"); a role without a token is left out.   others: special tokens without a role.
    adds_bos: whether BOS stands before a text; None where no file says it.
    """

    roles: Mapping[str, str]
    others: frozenset[str] = frozenset()
    adds_bos: bool | None = None

    def __contains__(self, token: object) -> bool:
        return token in self.others or token in self.roles.values()


def read_special_names(folder: Path) -> SpecialNames:
    """Read the names of the special tokens. Raises InputError, which names file and field, for other values."""
    found = {file: read_json_if_any(folder / file) for file in ("special_tokens_map.json", "tokenizer_config.json")}
    listed = {file: dict(_named(folder / file, content)) for file, content in found.items()}
    by_map, by_config = listed.values()
    config = found["tokenizer_config.json"]
    roles = {**by_map, **by_config} if "added_tokens_decoder" in config else {**by_config, **by_map}
    others = {token for file, content in found.items() for token in _further(folder / file, content)}
    adds_bos = config.get("add_bos_token")
    if not isinstance(adds_bos, bool | None):
        raise _wrong(folder / "tokenizer_config.json", "add_bos_token", "true, false or null", adds_bos)
    return SpecialNames(roles=roles, others=frozenset(others), adds_bos=adds_bos)


def read_added_tokens(folder: Path, names: SpecialNames | None = None) -> dict[str, AddedToken]:
    """The tokens that the folder's files list, by their text. Raises InputError for a wrong entry."""
    names = names or read_special_names(folder)
    config = read_json_if_any(folder / "tokenizer_config.json")
    tokens: dict[str, AddedToken] = {}
    if "added_tokens_decoder" not in config:
        file = folder / "added_tokens.json"
        for content, token_id in read_json_if_any(file).items():
            special = content in names
            entry = {"id": token_id, "content": content, "special": special, "normalized": not special}
            tokens[content] = _token(file, entry, names)
    for entry in _list(folder / "tokenizer.json", "added_tokens"):
        token = _token(folder / "tokenizer.json", entry, names)
        tokens[token.content] = token
    for token_id, entry in _mapping(folder / "tokenizer_config.json", config, "added_tokens_decoder").items():
        token = _token(folder / "tokenizer_config.json", {**_object(folder, entry), "id": _number(token_id)}, names)
        tokens[token.content] = token
    return tokens


def _named(file: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _NAMES:
        value = content.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise _wrong(file, key, "a token's text, an object with its `content`, or null", value)
        if text is not None:
            yield key, text


def _further(file: Path, content: Mapping[str, Any]) -> Iterator[str]:
    for key in _FURTHER:
        value = content.get(key) or ()
        values = value.values() if isinstance(value, dict) else value
        if isinstance(values, str | int | float):
            raise _wrong(file, key, "a list of tokens or null", value)
        for token in values:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str):
                raise _wrong(file, key, "a list of tokens or null", value)
            yield text


def _list(file: Path, key: str) -> list[Any]:
    value = read_json_if_any(file).get(key) or []
    if not isinstance(value, list):
        raise _wrong(file, key, "a list", value)
    return value


def _mapping(file: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(file, key, "an object of ids and tokens", value)
    return value


def _object(folder: Path, entry: Any) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else {"content": entry}


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _token(file: Path, entry: Any, names: SpecialNames) -> AddedToken:
    if not isinstance(entry, dict):
        raise _wrong(file, "an added token", "an object with `id` and `content`", entry)
    token_id, content = entry.get("id"), entry.get("content")
    if not isinstance(content, str) or isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
        raise _wrong(file, "an added token", "a text and its id, a whole number from 0 on", entry)
    flags = {flag: bool(entry[flag]) for flag in _FLAGS if entry.get(flag) is not None}
    special = bool(entry.get("special")) or content in names
    return AddedToken(token_id=token_id, content=content, **{**flags, "special": special})


def _wrong(file: Path, field: str, expected: str, found: Any) -> InputError:
    return InputError(f"{file}: expected {field} to be {expected}; found {found!r}. Correct it, or remove the field")

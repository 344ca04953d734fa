"""A LLaMA folder's tokenizer.json as AutoTokenizer reads it (transformers 5.17), without transformers' two seconds."""

from collections.abc import Iterable
from pathlib import Path

from alpaca.files.reading import read_json
from alpaca.text.added_tokens import AddedToken

_REBUILT = ("LlamaTokenizer", "LlamaTokenizerFast")  # classes that keep vocabulary and merges, and no other step
_SPACE = "▁"


def read_written(file: Path, listed: Iterable[AddedToken]):
    """A `tokenizers.Tokenizer` of its own for every call.

    LlamaTokenizer puts its own space in front, of the whole text or (`legacy`) of what follows each special token;
    other classes take the file's steps as they stand.   listed: added tokens, of which the file may lack some.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    backend = Tokenizer.from_file(str(file))
    config_file = file.with_name("tokenizer_config.json")
    config = read_json(config_file) if config_file.is_file() else {}
    if config.get("tokenizer_class") in _REBUILT:
        adds_space = config.get("add_prefix_space") is not False
        scheme = ("always" if config.get("legacy") is True else "first") if adds_space else "never"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    add_listed(backend, sorted(listed, key=lambda token: token.token_id))
    return backend


def add_listed(backend, tokens: Iterable[AddedToken]) -> None:
    """Add tokens, in this order, to a tokenizer that has them under their ids or comes to these by counting on."""
    from tokenizers import AddedToken as Added

    for token in tokens:
        flags = {name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([Added(token.content, **flags)])

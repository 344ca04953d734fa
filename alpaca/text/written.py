"""A LLaMA folder's tokenizer.json as AutoTokenizer reads it (transformers 5.17), without transformers' two seconds."""

from collections.abc import Iterable
from pathlib import Path

from alpaca.files.reading import read_json_if_any
from alpaca.text.added_tokens import AddedToken

_REBUILT = ("LlamaTokenizer", "CodeLlamaTokenizer")  # classes that keep vocabulary and merges, and no other step
# Models whose tokenizer.json AutoTokenizer takes as it stands, whatever class the folder names; the others of this kind
# are served by transformers, which knows its own list.
_WRITTEN_TYPES = frozenset({"granite", "ministral", "mistral", "mixtral", "olmo2", "phi3"})
_CLASS_TYPES = frozenset({"", "code_llama", "gemma", "gemma2", "gemma3_text", "llama"})
_WHOLE_CLASSES = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "MistralCommonBackend")
_SPACE = "▁"


def read_written(file: Path, listed: Iterable[AddedToken]):
    """A `tokenizers.Tokenizer` of its own for every call.

    LlamaTokenizer puts its own space in front, of the whole text or (`legacy`) of what follows each special token;
    other classes take the file's steps as they stand.   listed: added tokens, of which the file may lack some.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    backend = Tokenizer.from_file(str(file))
    config = read_json_if_any(file.with_name("tokenizer_config.json"))
    class_name = str(config.get("tokenizer_class")).removesuffix("Fast")
    model_type = read_json_if_any(file.with_name("config.json")).get("model_type") or ""
    if class_name in _REBUILT and not stands_as_written(model_type):
        adds_space, is_legacy = config.get("add_prefix_space") is not False, config.get("legacy") is True
        scheme = ("always" if is_legacy and class_name == "LlamaTokenizer" else "first") if adds_space else "never"
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    add_listed(backend, sorted(listed, key=lambda token: token.token_id))
    return backend


def stands_as_written(model_type: str) -> bool:
    """Whether AutoTokenizer takes this model type's tokenizer.json as it stands, though its class says otherwise."""
    if model_type in _WRITTEN_TYPES or model_type in _CLASS_TYPES:
        return model_type in _WRITTEN_TYPES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return (TOKENIZER_MAPPING_NAMES.get(model_type) or "").removesuffix("Fast") in _WHOLE_CLASSES


def add_listed(backend, tokens: Iterable[AddedToken]) -> None:
    """Add tokens, in this order, to a tokenizer that has them under their ids or comes to these by counting on."""
    from tokenizers import AddedToken as Added

    for token in tokens:
        flags = {name: getattr(token, name) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([Added(token.content, **flags)])

"""Tokenizers of transformers, for folders without a SentencePiece model: Llama 3, OPT, BLOOM and others."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from alpaca.errors import InputError, MissingInput
from alpaca.files.reading import list_folder
from alpaca.text.added_tokens import read_added_tokens, read_special_names
from alpaca.text.eos import first_eos_id
from alpaca.text.markers import MarkedEncoder
from alpaca.text.tiktoken import BYTE_OF, TIKTOKEN_FILE
from alpaca.text.tokenizer import PAD_TOKEN, Tokenizer

_PROBE = "Name two alpacas, please: one is 7."
_ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # the token of a byte, in vocabularies that fall back to them


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of transformers (Llama 3, OPT, BLOOM, a LLaMA folder that lost its tokenizer.model)."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingInput where there is no usable tokenizer, InputError where nothing in the folder names EOS."""
        names = read_special_names(folder)  # so that a wrong value is named, whatever transformers makes of it
        read_added_tokens(folder, names)
        self._tokenizer, self._tiktoken_file = _load_hugging_face(folder), folder / TIKTOKEN_FILE
        self.bos_id, self.eos_id = self._tokenizer.bos_token_id, _find_eos(self._tokenizer, folder)
        self.pad_id, self.size = self._tokenizer.pad_token_id, self._count_ids()
        self.base_size = self._tokenizer.vocab_size
        listed = (i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special)
        self.special_ids = frozenset([*self._tokenizer.all_special_ids, *listed, self.eos_id])
        self.named_tokens = dict(self._tokenizer.special_tokens_map)
        self.prefix_ids = _find_prefix(self._tokenizer)
        if names.adds_bos is False and self.prefix_ids == [self.bos_id]:
            self.prefix_ids = []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def is_unknown(self, token_id: int) -> bool:
        return self._tokenizer.unk_token == "<unk>" and token_id == self._tokenizer.unk_token_id

    def special_id(self, text: str) -> int | None:
        token_id = self._tokenizer.convert_tokens_to_ids(text)  # of a text that is no token: that of <unk>, or None
        is_special = token_id in self.special_ids and self._tokenizer.convert_ids_to_tokens(token_id) == text
        return token_id if is_special else None

    @cached_property
    def most_characters_per_token(self) -> int | None:
        added = self._tokenizer.added_tokens_decoder.values()
        factor = _most_composed(getattr(self._tokenizer, "backend_tokenizer", None))
        if factor is None or any(token.lstrip or token.rstrip for token in added):
            return None
        return factor * max(map(len, self._tokenizer.get_vocab()))

    @cached_property
    def marked_encoder(self) -> MarkedEncoder:
        from tokenizers import Tokenizer as Backend

        try:
            copy = Backend.from_str(self._tokenizer.backend_tokenizer.to_str())
        except Exception:  # no such backend, or one with steps in Python: the library has no class for that error
            return super().marked_encoder
        listed = (token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special)
        return MarkedEncoder(copy, [*self._tokenizer.all_special_tokens, *listed])

    def decode(self, ids: Sequence[int]) -> str:
        shown = [token_id for token_id in ids if token_id not in self.special_ids]
        return self._tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def bytes_inside(self, token_id: int) -> bytes:
        if token_id not in self._bytes_inside:
            self._bytes_inside[token_id] = self._find_bytes(token_id)
        return self._bytes_inside[token_id]

    @cached_property
    def _bytes_inside(self) -> dict[int, bytes]:
        """Those that were asked for: a scored token names up to twenty others, and decoding each takes microseconds."""
        return {}

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self.special_ids:
            return b""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a vocabulary may leave ids out
            return b""
        if token_id not in self._added_ids:
            if self._is_byte_level and all(character in BYTE_OF for character in token):
                return bytes(map(BYTE_OF.__getitem__, token))
            if byte := _ONE_BYTE.fullmatch(token):
                return bytes([int(byte[1], 16)])
        before = self._any_text
        return self.decode([*before, token_id])[len(self.decode(before)) :].encode()

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        """Tokens that are written as they read, whatever the others are."""
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether each character of a token stands for a byte."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        steps = [] if backend is None else [*_steps(backend.pre_tokenizer), *_steps(backend.decoder)]
        return any(step["type"] == "ByteLevel" for step in steps)

    @cached_property
    def _any_text(self) -> list[int]:
        """Ids of a text, after which a token shows all of its own."""
        return self.encode("a")

    def add_pad_token(self) -> bool:
        if self.pad_id is not None:
            return False
        self._tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        self.pad_id, self.size = self._tokenizer.pad_token_id, self._count_ids()
        self.special_ids |= {self.pad_id}
        return True

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)
        if self._tiktoken_file.is_file() and self._tiktoken_file.absolute() != (folder / TIKTOKEN_FILE).absolute():
            shutil.copyfile(self._tiktoken_file, folder / TIKTOKEN_FILE)

    def _count_ids(self) -> int:
        """One more than the highest id: a vocabulary may leave ids out, so its length would be too small."""
        return max(self._tokenizer.get_vocab().values()) + 1


def _find_eos(tokenizer, folder: Path) -> int:
    """The tokenizer's EOS id, or where it names none, the first of the model's configs. Raises InputError."""
    eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else first_eos_id(folder)
    if eos_id is None:
        raise InputError(
            f"the tokenizer in {folder} names no eos_token, and no config there an eos_token_id; add eos_token to its "
            "tokenizer_config.json"
        )
    return eos_id


def _most_composed(backend) -> int | None:
    """How many characters of a text one character of a token may stand for; None: any number, or it is not known.

    Known are vocabularies that hold every byte, behind steps that drop nothing. NFC and NFKC make one character of at
    most four.
    """
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    before, cuts = list(_steps(backend.normalizer)), list(_steps(backend.pre_tokenizer))
    if not backend.model.byte_fallback and not any(step["type"] == "ByteLevel" for step in cuts):
        return None
    if not all(_keeps_characters(step) for step in [*before, *cuts]):
        return None
    return 4 if any(step["type"] in ("NFC", "NFKC") for step in before) else 1


def _steps(part) -> Iterator[dict[str, Any]]:
    """What a normalizer, pre-tokenizer or decoder of `tokenizers` does, step by step, as tokenizer.json has it."""
    step = json.loads(part.__getstate__()) if part is not None else {"type": "Sequence"}
    inner = step.get("normalizers") or step.get("pretokenizers") or step.get("decoders") or []
    yield from inner if step["type"] == "Sequence" else [step]


def _keeps_characters(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return "String" in step["pattern"] and len(step["content"]) >= len(step["pattern"]["String"])
    if step["type"] == "Split":
        return step["behavior"] != "Removed"
    return step["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "ByteLevel", "Digits", "Metaspace")


def _find_prefix(tokenizer) -> list[int]:
    """What the tokenizer puts before a text. What it puts after one, EOS as a rule, belongs after the answer."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(starts, 0)] if bare else []


def _load_hugging_face(folder: Path):
    """AutoTokenizer's, or tokenizer.json as it is written where AutoTokenizer cannot read it or loses text.

    transformers 5 rebuilds the tokenizer from its vocabulary by the rules of the class that the folder names, and
    folders exist whose class fits other rules: a byte-level vocabulary under LlamaTokenizerFast.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_json = (folder / "tokenizer.json").is_file()
    tokenizer, problem = _try(AutoTokenizer, folder)
    if has_json and (tokenizer is None or not _keeps_text(tokenizer)):
        as_written, _ = _try(PreTrainedTokenizerFast, folder)
        if as_written is not None and (tokenizer is None or _keeps_text(as_written)):
            return as_written
    if tokenizer is None:
        raise MissingInput(
            f"no usable tokenizer in {folder} (found: {list_folder(folder)}): {problem}\n"
            "copy the model's tokenizer.model, or its tokenizer.json and tokenizer_config.json, into that folder"
        ) from problem
    return tokenizer


def _try(kind, folder: Path):
    """A tokenizer of this class, or None and what went wrong: anything, since the folder's content steers Python."""
    try:
        return kind.from_pretrained(folder, trust_remote_code=False), None
    except Exception as error:
        return None, error


def _keeps_text(tokenizer) -> bool:
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) == _PROBE

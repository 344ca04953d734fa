"""A folder's tokenizer as llama.cpp wants it in a GGUF file: a list of tokens, their kinds, and scores or merges.

llama.cpp knows two kinds that LLaMA models use: "llama" is SentencePiece's BPE, which joins the pair with the best
score; "gpt2" is byte-level BPE with ranked merges (Llama 3's). It normalises no text, and knows the patterns that cut
text before byte-level BPE by name alone.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.reading import read_json
from alpaca.text.added_tokens import read_added_tokens
from alpaca.text.chat.files import read_chat_template
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import (
    SentencePieceTokenizer,
    describe_other_vocabulary,
    is_sentencepiece,
    load_sentencepiece,
)
from alpaca.text.tiktoken import PIECES
from alpaca.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# llama.cpp's token types; https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_OTHER_WAY = "llama.cpp's own convert_hf_to_gguf.py may know it"
_LEAST_SCORE = -1000.0  # of tokens that no merge makes
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; every id below the embedding's rows has a token, each text its own.

    model: "llama" or "gpt2".    pre: llama.cpp's name for how text is cut first.    scores: of "llama", else None.
    merges: of "gpt2", "left right", best first; else None.    token_ids: of bos, eos, unk and pad, where there are.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    adds_bos: bool
    adds_space: bool
    token_ids: dict[str, int]
    chat_template: str | None


@dataclass
class _Table:
    """Tokens by their ids, while they are collected."""

    tokens: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float]

    def add(self, token_id: int, token: str, kind: int, score: float = _LEAST_SCORE) -> None:
        self.tokens[token_id], self.types[token_id], self.scores[token_id] = token, kind, score


def read_vocabulary(folder: Path, *, num_rows: int, model_folder: Path) -> Vocabulary:
    """The tokenizer in `folder` for the model in `model_folder`, whose embedding has `num_rows` rows.

    Rows without a token get unused ones; added tokens without a row, such as the padding token of a run that did not
    resize its model, are left out. Raises MissingInput, InputError for a tokenizer llama.cpp has no equal of.
    """
    tokenizer = load_tokenizer(folder)
    tokenizer.require_rows(num_rows, model_folder)
    model_file = folder / "tokenizer.model"
    if model_file.is_file() and is_sentencepiece(model_file) and describe_other_vocabulary(folder) is None:
        tokenizer = load_sentencepiece(folder, model_file)  # llama.cpp wants its scores, and finds added tokens itself
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer, folder, num_rows)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has a tokenizer without tokenizer.model or tokenizer.json; {_OTHER_WAY}")
    written = read_json(folder / "tokenizer.json")
    if _is_byte_level(written):
        return _from_byte_level(tokenizer, written, folder, num_rows)
    if written["model"].get("byte_fallback") and written["model"].get("merges"):
        return _from_byte_fallback(tokenizer, written, folder, num_rows)
    raise InputError(
        f"{folder / 'tokenizer.json'} is neither SentencePiece's BPE with byte fallback nor byte-level BPE "
        f"(found a {written['model'].get('type')!r} model); {_OTHER_WAY}"
    )


# SentencePiece ----------------------------------------------------------------------------------------------------


def _from_sentencepiece(tokenizer: SentencePieceTokenizer, folder: Path, num_rows: int) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.model_file.read_bytes())
    _check_sentencepiece(proto, tokenizer.model_file)
    kinds = proto.SentencePiece
    types = {
        kinds.NORMAL: NORMAL, kinds.UNKNOWN: UNKNOWN, kinds.CONTROL: CONTROL, kinds.USER_DEFINED: USER_DEFINED,
        kinds.UNUSED: UNUSED, kinds.BYTE: BYTE,
    }  # fmt: skip
    table = _Table({}, {}, {})
    for token_id, piece in enumerate(proto.pieces):
        table.add(token_id, piece.piece, types[piece.type], piece.score)
    for token in read_added_tokens(folder).values():
        if not token.special:
            table.add(token.token_id, token.content, USER_DEFINED)
        elif token.token_id >= tokenizer.base_size:  # text that looks like one stays text, as everywhere here
            table.add(token.token_id, token.content, CONTROL)
    adds_space, unknown = tokenizer.drops_first_space, proto.trainer_spec.unk_id  # what it adds it drops
    return _vocabulary(tokenizer, table, folder, num_rows, unknown=unknown, adds_space=adds_space)


def _check_sentencepiece(proto, model_file: Path) -> None:
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise InputError(f"{model_file} is not a BPE model, which LLaMA's tokenizer is; {_OTHER_WAY}")
    num_bytes = sum(piece.type == proto.SentencePiece.BYTE for piece in proto.pieces)
    if num_bytes != 256:
        raise InputError(
            f"{model_file} has {num_bytes} byte tokens; llama.cpp needs all 256 to tokenize characters without a token"
        )
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        logger.warning(
            "%s normalises text (%s), llama.cpp does not: some texts will get other tokens there",
            model_file, spec.name or "it removes extra spaces",
        )  # fmt: skip


def _from_byte_fallback(tokenizer: Tokenizer, written: dict, folder: Path, num_rows: int) -> Vocabulary:
    """SentencePiece's BPE as a tokenizer.json: the scores were lost, the order of the merges gives others as good."""
    model = written["model"]
    scores = _scores_of(_merge_pairs(model["merges"]), folder)
    table = _Table({}, {}, {})
    for token, token_id in model["vocab"].items():
        kind = BYTE if _BYTE_TOKEN.fullmatch(token) else UNKNOWN if token == model.get("unk_token") else NORMAL
        table.add(token_id, token, kind, scores.get(token, _LEAST_SCORE * len(scores) if kind == NORMAL else 0.0))
    num_bytes = sum(kind == BYTE for kind in table.types.values())
    if num_bytes != 256:
        raise InputError(f"{folder / 'tokenizer.json'} has {num_bytes} byte tokens; llama.cpp needs all 256")
    for entry in written.get("added_tokens", []):
        if entry["content"] != model.get("unk_token"):
            table.add(entry["id"], entry["content"], CONTROL if entry.get("special") else USER_DEFINED, 0.0)
    steps = [*_parts(written.get("normalizer"), "normalizers"), *_parts(written.get("pre_tokenizer"), "pretokenizers")]
    adds_space = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    unknown = model["vocab"].get(model.get("unk_token"))
    return _vocabulary(tokenizer, table, folder, num_rows, unknown=unknown, adds_space=adds_space)


def _scores_of(pairs: Iterable[tuple[str, str]], folder: Path) -> dict[str, float]:
    """A score for each merged piece: the first to be merged has the best. Raises InputError where there is no such."""
    scores: dict[str, float] = {}
    last = ""
    for left, right in pairs:
        piece = left + right
        if piece != last and piece in scores:
            raise InputError(
                f"{folder / 'tokenizer.json'} ranks its merges otherwise than SentencePiece ({piece!r} comes twice); "
                "copy the model's tokenizer.model into that folder"
            )
        scores.setdefault(piece, -1.0 - len(scores))
        last = piece
    return scores


# Byte-level BPE ---------------------------------------------------------------------------------------------------


def _is_byte_level(written: dict) -> bool:
    parts = [*_parts(written.get("pre_tokenizer"), "pretokenizers"), *_parts(written.get("decoder"), "decoders")]
    return bool(written["model"].get("merges")) and any(part["type"] == "ByteLevel" for part in parts)


def _from_byte_level(tokenizer: Tokenizer, written: dict, folder: Path, num_rows: int) -> Vocabulary:
    model = written["model"]
    pre = _name_of_pattern(written, folder)
    table = _Table({}, {}, {})
    for token, token_id in model["vocab"].items():
        table.add(token_id, token, NORMAL)
    for entry in written.get("added_tokens", []):
        table.add(entry["id"], entry["content"], CONTROL if entry.get("special") else USER_DEFINED)
    merges = [f"{left} {right}" for left, right in _merge_pairs(model["merges"])]
    return _vocabulary(tokenizer, table, folder, num_rows, pre=pre, merges=merges)


def _name_of_pattern(written: dict, folder: Path) -> str:
    """llama.cpp's name for a byte-level tokenizer's cutting pattern. Raises InputError for one that it has not."""
    steps = list(_parts(written.get("pre_tokenizer"), "pretokenizers"))
    kinds = [step["type"] for step in steps]
    last = next((step for step in steps if step["type"] == "ByteLevel"), {})
    plain = written.get("normalizer") is None and not last.get("add_prefix_space") and kinds[-1:] == ["ByteLevel"]
    if plain and kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern == PIECES and steps[0]["behavior"] == "Isolated":
            # Both cut text alike; the first takes a piece of text that is a token as it is, whatever the merges say.
            return "llama-bpe" if written["model"].get("ignore_merges") else "smaug-bpe"
    found = {"normalizer": written.get("normalizer"), "pre_tokenizer": written.get("pre_tokenizer")}
    raise InputError(
        f"{folder / 'tokenizer.json'} cuts text before BPE in a way that is not Llama 3's, GPT-2's or SmolLM's: "
        f"{found}; {_OTHER_WAY}"
    )


# Both -------------------------------------------------------------------------------------------------------------


def _parts(step: dict | None, key: str) -> Iterator[dict]:
    """The steps of a tokenizer.json's pipeline, which may be none, one, or sequences of them."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[key]:
            yield from _parts(part, key)
    else:
        yield step


def _merge_pairs(merges: list) -> list[tuple[str, str]]:
    """Merges as pairs; until 2024 tokenizer.json had them as "left right"."""
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _vocabulary(
    tokenizer: Tokenizer,
    table: _Table,
    folder: Path,
    num_rows: int,
    *,
    pre: str = "default",
    merges: list[str] | None = None,
    unknown: int | None = None,
    adds_space: bool = False,
) -> Vocabulary:
    beyond = [table.tokens[token_id] for token_id in sorted(table.tokens) if token_id >= num_rows]
    if beyond:
        logger.warning("%s has %s beyond the model's %d rows: left out", folder, ", ".join(beyond[:5]), num_rows)
    _check_prefix(tokenizer, folder)
    for token_id in set(range(num_rows)) - set(table.tokens):
        table.add(token_id, f"<|unused {token_id}|>", UNUSED)
    ids = range(num_rows)
    tokens = [table.tokens[token_id] for token_id in ids]
    twice = sorted(token for token, count in Counter(tokens).items() if count > 1)
    if twice:  # llama.cpp aborts on it
        raise InputError(f"{folder} has more than one id for {', '.join(map(repr, twice[:5]))}, which GGUF cannot hold")
    if max(tokenizer.eos_id, *tokenizer.prefix_ids, 0) >= num_rows:
        raise InputError(
            f"BOS {tokenizer.bos_id} and EOS {tokenizer.eos_id} of {folder} must have rows in the model's embedding, "
            f"which has {num_rows}: this is another model's tokenizer"
        )
    template = read_chat_template(folder)
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": unknown, "pad": tokenizer.pad_id}
    return Vocabulary(
        model="llama" if merges is None else "gpt2",
        pre=pre,
        tokens=tokens,
        types=[table.types[token_id] for token_id in ids],
        scores=[table.scores[token_id] for token_id in ids] if merges is None else None,
        merges=merges,
        adds_bos=bool(tokenizer.prefix_ids),
        adds_space=adds_space,
        token_ids={name: token_id for name, token_id in named.items() if token_id is not None and token_id < num_rows},
        chat_template=None if template is None else template.source,
    )


def _check_prefix(tokenizer: Tokenizer, folder: Path) -> None:
    if tokenizer.prefix_ids not in ([], [tokenizer.bos_id]):
        raise InputError(
            f"the tokenizer in {folder} puts the ids {tokenizer.prefix_ids} before a text; llama.cpp can put BOS "
            f"({tokenizer.bos_id}) or nothing"
        )

"""Llama 3's tokenizer.model: a tiktoken file, one base64 token and its rank a line, and its tokenizer.json.

A text is cut into pieces by one regular expression; within a piece the two neighbours whose joined bytes have the
lowest rank are joined until no two have one. The 256 special tokens come after the ranks and stand in no file: their
names are the release's. Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py, names
as Meta published them on Hugging Face.
"""

import base64
import shutil
from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.atomic import write_json, write_text

TIKTOKEN_FILE = "tokenizer.tiktoken"  # not tokenizer.model, which other programs take for SentencePiece
TIKTOKEN_TOKENIZER_FILES = (TIKTOKEN_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
NUM_SPECIAL_TOKENS = 256
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BEGIN, _END, _TURN_END, _MESSAGE_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
_PAD = "<|finetune_right_pad_id|>"
_HEADERS = {6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: _TURN_END}
_NAMED_SPECIALS = {  # place after the ranks -> name; all others are reserved and numbered
    "3": {0: _BEGIN, 1: _END, **_HEADERS},
    "3.1": {0: _BEGIN, 1: _END, 4: _PAD, **_HEADERS, 8: _MESSAGE_END, 10: "<|python_tag|>"},
}


class TiktokenModel:
    """A tiktoken file with the special tokens of a release.

    bos_id, eos_id, pad_id (Llama 3 has none), size: as of a `Tokenizer`.   eos_ids: all that end an answer.
    """

    def __init__(self, model_file: Path, *, version: str = "3.1", instruct: bool = False) -> None:
        """`version`: "3", or anything later; `instruct`: a turn's end is EOS. Raises InputError for a damaged file."""
        self.model_file = Path(model_file)
        self.ranks = read_ranks(self.model_file)
        self.special_tokens = special_tokens(version)
        self.size = len(self.ranks) + len(self.special_tokens)
        ends = [_END, _MESSAGE_END, _TURN_END] if instruct else [_END]
        self.eos_ids = [self._id(token) for token in ends if token in self.special_tokens]
        self.eos_token = _TURN_END if instruct else _END
        self.pad_token = _PAD if _PAD in self.special_tokens else None
        self.bos_id, self.eos_id = self._id(_BEGIN), self._id(self.eos_token)
        self.pad_id = self._id(_PAD) if self.pad_token else None

    def save(self, folder: Path, *, max_length: int | None = None) -> None:
        """Write TIKTOKEN_TOKENIZER_FILES into `folder`; through AutoTokenizer they give tiktoken's ids, BOS in front.

        Literal special tokens are special there, as in SentencePiece folders; our own tokenizers read them as text.
        """
        shutil.copyfile(self.model_file, folder / TIKTOKEN_FILE)
        write_text(folder / "tokenizer.json", self._backend().to_str(pretty=False))
        tokens = {"bos_token": _BEGIN, "eos_token": self.eos_token}
        if self.pad_token:
            tokens["pad_token"] = self.pad_token
        write_json(folder / "special_tokens_map.json", tokens)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "right",
            "split_special_tokens": False,
            **tokens,
        }
        if max_length:
            config["model_max_length"] = max_length
        write_json(folder / "tokenizer_config.json", config)

    def _id(self, special_token: str) -> int:
        return len(self.ranks) + self.special_tokens.index(special_token)

    def _backend(self):
        """A `tokenizers` pipeline that does what tiktoken does."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend

        vocabulary = {_visible(token): rank for token, rank in self.ranks.items()}
        backend = Backend(models.BPE(vocabulary, _merges(self.ranks), ignore_merges=True))
        cut = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in self.special_tokens])
        bos = processors.TemplateProcessing(
            single=f"{_BEGIN} $A", pair=f"{_BEGIN} $A {_BEGIN}:1 $B:1", special_tokens=[(_BEGIN, self.bos_id)]
        )
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
        return backend


def special_tokens(version: str) -> list[str]:
    """The 256 names in order of their ids: Llama 3's for "3", else those of 3.1, which 3.2 and 3.3 kept."""
    named = _NAMED_SPECIALS["3" if version == "3" else "3.1"]
    reserved = iter(range(NUM_SPECIAL_TOKENS))
    return [named.get(place) or f"<|reserved_special_token_{next(reserved)}|>" for place in range(NUM_SPECIAL_TOKENS)]


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins as a tiktoken file does; `read_ranks` says what is wrong with the rest."""
    with open(path, "rb") as file:
        first = file.readline(1000)
    try:
        _parse(first)
    except ValueError:
        return False
    return True


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the bytes and rank of every token. Raises InputError, which names the line, for a damaged file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = _parse(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: expected a base64 token and its rank, found {line!r}") from error
        if token in ranks:
            raise InputError(f"{path}, line {number}: the token {token!r} stands there twice")
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        what = f"no token for the byte {missing[0]}" if missing else "ranks that leave numbers out"
        raise InputError(f"{path} ({len(ranks)} tokens) has {what}; it is damaged or truncated, get it again")
    return ranks


def _parse(line: bytes) -> tuple[bytes, int]:
    token, rank = line.split()
    return base64.b64decode(token, validate=True), int(rank)  # what is no base64 is a ValueError, too


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that join into a token, lowest rank first: the order in which tiktoken merges."""
    pairs = [
        (rank, token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    pairs.sort(key=lambda pair: (pair[0], ranks[pair[1]], ranks[pair[2]]))
    return [(_visible(left), _visible(right)) for _, left, right in pairs]


def _byte_characters() -> list[str]:
    """GPT-2's character for each byte: the byte's own where that is visible, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


_CHARACTERS = _byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(_CHARACTERS)}


def _visible(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))

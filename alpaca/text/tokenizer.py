"""Tokenizers: exactly SentencePiece where a folder holds a `tokenizer.model`, Hugging Face's own elsewhere.

transformers' LlamaTokenizer does not give SentencePiece's ids (text that starts with a space differs), so a LLaMA
folder is tokenized from its `tokenizer.model` here, and for other people's programs a `tokenizer.json` is written that
gives the same ids through AutoTokenizer (`write_llama_tokenizer`). In user text a special token is text; BOS and EOS
are added by id.
"""

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from alpaca.errors import InputError, MissingInput
from alpaca.files.atomic import write_json, write_text
from alpaca.files.reading import list_folder, read_json
from alpaca.text.tiktoken import TIKTOKEN_FILE, is_tiktoken

logger = logging.getLogger(__name__)

PAD_TOKEN = "[PAD]"  # what the original recipe adds when a tokenizer has no padding token
LLAMA_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SPACE = "▁"  # SentencePiece's visible space


class Tokenizer(ABC):
    """What the stages need of a tokenizer.

    prefix_ids: what stands before every text (BOS, for most).   size: number of ids, added tokens included.
    special_ids: ids that stand for no text.                      base_size: without the added tokens.
    pad_id, bos_id: None where there is none.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int | None
    size: int
    base_size: int
    prefix_ids: list[int]
    special_ids: frozenset[int]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without prefix or EOS; literal special tokens in the text stay text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence; special tokens stand for nothing."""

    @abstractmethod
    def add_pad_token(self) -> bool:
        """Add `[PAD]` as the last id where there is no padding token; true if it was added."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write files that `load_tokenizer` and AutoTokenizer read back to the same ids."""

    @property
    def fill_id(self) -> int:
        """What fills rows up, masked and without loss: the padding token, or EOS where there is none."""
        return self.eos_id if self.pad_id is None else self.pad_id

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def require_rows(self, num_rows: int, folder: Path) -> None:
        """Raise InputError when a model's embedding has fewer rows than this tokenizer had from the start."""
        if self.base_size > num_rows:
            raise InputError(
                f"the tokenizer has {self.base_size} tokens, the embedding of {folder} {num_rows} rows: "
                "this is another model's tokenizer"
            )

    def token_bytes(self, token_id: int) -> bytes | None:
        """The UTF-8 bytes one id stands for, or None where that depends on its neighbours."""
        return None


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece itself, plus the tokens that fine-tuning added after its vocabulary (`[PAD]`)."""

    def __init__(self, model_file: Path, *, added: dict[str, int] | None = None, pad_token: str | None = None) -> None:
        """`added`: tokens and their ids, of which those beyond the model's own count; `pad_token`: one of either."""
        from sentencepiece import SentencePieceProcessor

        self.model_file = Path(model_file)
        try:
            self._processor = SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{model_file} is no SentencePiece model, or a damaged one: {error}") from error
        self.base_size = self._processor.get_piece_size()
        self._added = {token: token_id for token, token_id in (added or {}).items() if token_id >= self.base_size}
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError(f"{model_file} has no BOS or no EOS token (ids {self.bos_id}, {self.eos_id})")
        own_pad_id = self._processor.pad_id()
        self.pad_id = own_pad_id if own_pad_id >= 0 else self.id_of(pad_token)
        self.prefix_ids = [self.bos_id]
        self.size = max([self.base_size - 1, *self._added.values()]) + 1
        self._bytes = [self._piece_bytes(token_id) for token_id in range(self.base_size)]
        controls = (i for i in range(self.base_size) if self._processor.is_control(i))
        self.special_ids = frozenset([*controls, *self._added.values()])

    def id_of(self, token: str | None) -> int | None:
        """The id of a token, the model's own or an added one; None where there is no such token."""
        if not token:
            return None
        token_id = self._processor.piece_to_id(token)  # of an unknown piece: that of <unk>
        return token_id if self._processor.id_to_piece(token_id) == token else self._added.get(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=-1) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ")  # the space SentencePiece puts before every text

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def add_pad_token(self) -> bool:
        if self.pad_id is not None:
            return False
        self.pad_id = self._added[PAD_TOKEN] = self.size
        self.special_ids |= {self.pad_id}
        self.size += 1
        return True

    def save(self, folder: Path, *, max_length: int | None = None) -> None:
        pad = next((token for token, token_id in self._added.items() if token_id == self.pad_id), None)
        write_llama_tokenizer(self.model_file, folder, added=self._added, pad_token=pad, max_length=max_length)

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_control(token_id):
            return b""
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if self._processor.is_unknown(token_id):
            return " ⁇ ".encode()  # SentencePiece's own surface of the unknown token
        return piece.replace(_SPACE, " ").encode()


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of transformers (Llama 3, OPT, BLOOM, a LLaMA folder that lost its tokenizer.model)."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer, self._tiktoken_file = _load_hugging_face(folder), folder / TIKTOKEN_FILE
        if self._tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer in {folder} names no eos_token; add it to its tokenizer_config.json")
        self.bos_id, self.eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.pad_id, self.size = self._tokenizer.pad_token_id, self._count_ids()
        self.base_size = self._tokenizer.vocab_size
        listed = (i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special)
        self.special_ids = frozenset([*self._tokenizer.all_special_ids, *listed])
        around = self._tokenizer("")["input_ids"]
        self.prefix_ids = around[:-1] if len(around) > 1 and around[-1] == self.eos_id else around

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

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
        """One more than the highest id: a vocabulary may leave some out."""
        return max(self._tokenizer.get_vocab().values()) + 1


# Loading ------------------------------------------------------------------------------------------------------


def read_eos_ids(folder: Path, tokenizer: Tokenizer, *, vocab_size: int) -> frozenset[int]:
    """EOS by the tokenizer, and by the folder's configs unless their ids are known not to be trusted.

    Ids that the model has no row for are left out.
    """
    named = {tokenizer.eos_id}
    if not isinstance(tokenizer, SentencePieceTokenizer):
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                ids = read_json(folder / name).get("eos_token_id")
                named |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(token_id for token_id in named if 0 <= token_id < vocab_size)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: SentencePiece's when it holds a `tokenizer.model`, else Hugging Face's.

    Known bad configs (class LLaMATokenizer, bos = eos = unk, wrong ids) do no harm to the first kind, whose special
    tokens come from the model file; what they say otherwise is logged. Raises MissingInput, InputError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingInput(f"no tokenizer folder {folder}")
    model_file = folder / "tokenizer.model"
    if model_file.is_file() and is_sentencepiece(model_file):
        return _load_sentencepiece(folder, model_file)
    if model_file.is_file() and not is_tiktoken(model_file):
        raise InputError(
            f"{model_file} ({model_file.stat().st_size} bytes) is neither a SentencePiece model (LLaMA 1, 2) nor a "
            "tiktoken file (Llama 3): it is damaged, cut short or a Git LFS pointer. Copy the model's own again"
        )
    if model_file.is_file() and not (folder / "tokenizer.json").is_file():
        raise MissingInput(
            f"{folder} has Llama 3's tokenizer.model but no tokenizer.json; alpaca.formats.meta.to_hf "
            "writes one, or copy the one of the model's Hugging Face repository"
        )
    return HuggingFaceTokenizer(folder)


def is_sentencepiece(model_file: Path) -> bool:
    """Whether a file is a SentencePiece model (Llama 3's `tokenizer.model` is not)."""
    try:
        return len(_read_proto(model_file).pieces) > 0
    except InputError:
        return False


def _load_sentencepiece(folder: Path, model_file: Path) -> SentencePieceTokenizer:
    config = _special_tokens(folder)
    tokenizer = SentencePieceTokenizer(model_file, added=_listed_tokens(folder), pad_token=config.get("pad_token"))
    right = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    wrong = {key: config[key] for key in right if key in config and tokenizer.id_of(config[key]) != right[key]}
    if wrong:
        said = ", ".join(f"{key} is {value!r}" for key, value in wrong.items())
        logger.warning("%s says %s; its tokenizer.model is right: %s", folder, said, tokenizer_summary(tokenizer))
    return tokenizer


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, pad_token and the like, as the folder's configs name them."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            for key, value in read_json(folder / file).items():
                content = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(content, str):
                    named[key] = content
    return named


def _listed_tokens(folder: Path) -> dict[str, int]:
    """Special and added tokens as tokenizer.json lists them, or added_tokens.json of older folders."""
    added: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        added.update(read_json(folder / "added_tokens.json"))
    if (folder / "tokenizer.json").is_file():
        entries = read_json(folder / "tokenizer.json").get("added_tokens", [])
        added.update({entry["content"]: entry["id"] for entry in entries})
    return added


def _load_hugging_face(folder: Path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():  # as written, where the model's own class would rebuild it
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise MissingInput(
            f"no usable tokenizer in {folder} (found: {list_folder(folder)}): {error}\n"
            "copy the model's tokenizer.model, or its tokenizer.json and tokenizer_config.json, into that folder"
        ) from error


# Writing a SentencePiece model as tokenizer.json ----------------------------------------------------------------


def write_llama_tokenizer(
    model_file: Path,
    folder: Path,
    *,
    added: dict[str, int] | None = None,
    pad_token: str | None = None,
    max_length: int | None = None,
) -> None:
    """Write LLAMA_TOKENIZER_FILES into `folder`.

    Through AutoTokenizer they give SentencePiece's ids for any text but literal special tokens, which stay special so
    that programs that append `eos_token` as text get EOS. The class is named PreTrainedTokenizerFast because
    transformers' LlamaTokenizer would rebuild the pipeline and lose leading spaces. Raises InputError.
    """
    proto = _read_proto(model_file)
    backend = _build_backend(proto, model_file, added or {})
    if model_file.absolute() != (folder / "tokenizer.model").absolute():
        shutil.copyfile(model_file, folder / "tokenizer.model")
    write_text(folder / "tokenizer.json", backend.to_str(pretty=False))
    tokens = {f"{name}_token": proto.pieces[token_id].piece for name, token_id in _special_ids(proto).items()}
    if pad_token:
        tokens["pad_token"] = pad_token
    write_json(folder / "special_tokens_map.json", tokens)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "split_special_tokens": False,
        **tokens,
    }
    if max_length:
        config["model_max_length"] = max_length
    write_json(folder / "tokenizer_config.json", config)


def _read_proto(model_file: Path):
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(model_file).read_bytes())
    except DecodeError as error:
        raise InputError(f"{model_file} is not a SentencePiece model; expected Meta's tokenizer.model") from error
    if proto.pieces and not (proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise InputError(f"{model_file} is cut short: it has a vocabulary and no settings; copy the model's own again")
    if not proto.pieces:
        raise InputError(f"{model_file} holds no SentencePiece vocabulary; expected Meta's tokenizer.model")
    return proto


def _special_ids(proto) -> dict[str, int]:
    spec = proto.trainer_spec
    return {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id}


def _build_backend(proto, model_file: Path, added: dict[str, int]):
    """A `tokenizers` pipeline that does what SentencePiece's BPE does."""
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as Backend

    kinds = proto.SentencePiece
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise InputError(f"{model_file} is not a BPE model, which LLaMA's tokenizer is")
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    bytes_fall_back = any(piece.type == kinds.BYTE for piece in proto.pieces)
    merges = _merges(proto)
    backend = Backend(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_fall_back))
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    special += sorted(added, key=added.__getitem__)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if any(piece.type == kinds.USER_DEFINED for piece in proto.pieces):
        logger.warning("%s has user-defined symbols; text around them may differ through AutoTokenizer", model_file)
    bos_id = proto.trainer_spec.bos_id
    bos = proto.pieces[bos_id].piece
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    return backend


def _merges(proto) -> list[tuple[str, str]]:
    """Every way to build a piece from two others, best score first: the order in which SentencePiece merges."""
    kinds = proto.SentencePiece
    scores = {p.piece: p.score for p in proto.pieces if p.type in (kinds.NORMAL, kinds.USER_DEFINED)}
    pairs = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pairs.sort(key=lambda pair: -pair[0])
    return [(left, right) for _, left, right in pairs]


def _normalizer(spec):
    """SentencePiece's normalisation. LLaMA's is only the space put in front and the spaces made visible."""
    from tokenizers import Regex, normalizers

    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def tokenizer_summary(tokenizer: Tokenizer) -> str:
    """One line for a log."""
    ids = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "PAD": tokenizer.pad_id}
    return f"{tokenizer.size} tokens, " + json.dumps(ids)

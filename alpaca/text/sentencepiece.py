"""LLaMA's tokenizer: exactly SentencePiece, from a folder's `tokenizer.model`, and the files that others read.

transformers' LlamaTokenizer does not give SentencePiece's ids (text that starts with a space differs). So a LLaMA
folder is tokenized from its `tokenizer.model` here, and for other people's programs a `tokenizer.json` is written that
gives the same ids through AutoTokenizer.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.atomic import write_json, write_text
from alpaca.files.reading import read_json
from alpaca.text.tokenizer import PAD_TOKEN, Tokenizer, tokenizer_summary

logger = logging.getLogger(__name__)
LLAMA_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SPACE = "▁"  # SentencePiece's visible space


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece itself, plus the tokens that fine-tuning added after its vocabulary (`[PAD]`)."""

    def __init__(self, model_file: Path, *, added: dict[str, int] | None = None, pad_token: str | None = None) -> None:
        """added: tokens and their ids; those of the model's own are ignored.   pad_token: an added or own token."""
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


def is_sentencepiece(model_file: Path) -> bool:
    """Whether a file is a SentencePiece model (Llama 3's `tokenizer.model` is not)."""
    try:
        return len(_read_proto(model_file).pieces) > 0
    except InputError:
        return False


def load_sentencepiece(folder: Path, model_file: Path) -> SentencePieceTokenizer:
    config = _special_tokens(folder)
    tokenizer = SentencePieceTokenizer(model_file, added=listed_tokens(folder), pad_token=config.get("pad_token"))
    right = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    wrong = {key: config[key] for key in right if key in config and tokenizer.id_of(config[key]) != right[key]}
    if wrong:
        said = ", ".join(f"{key} is {value!r}" for key, value in wrong.items())
        logger.warning("%s says %s; its tokenizer.model is right: %s", folder, said, tokenizer_summary(tokenizer))
    return tokenizer


def _special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens (bos_token, eos_token, pad_token, …) that the folder's configs name."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            for key, value in read_json(folder / file).items():
                content = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(content, str):
                    named[key] = content
    return named


def listed_tokens(folder: Path) -> dict[str, int]:
    """Special and added tokens as tokenizer.json lists them, or added_tokens.json of older folders."""
    added: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        added.update(read_json(folder / "added_tokens.json"))
    if (folder / "tokenizer.json").is_file():
        entries = read_json(folder / "tokenizer.json").get("added_tokens", [])
        added.update({entry["content"]: entry["id"] for entry in entries})
    return added


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
    """All pairs of pieces that join into a piece, best score first: the order in which SentencePiece merges."""
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

"""LLaMA's tokenizer: exactly SentencePiece, from a folder's `tokenizer.model`, and the files that others read.

transformers' LlamaTokenizer does not give SentencePiece's ids (text that starts with a space differs). So a LLaMA
folder is tokenized from its `tokenizer.model` here, and for other people's programs a `tokenizer.json` is written that
gives the same ids through AutoTokenizer.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.atomic import write_json, write_text
from alpaca.files.reading import read_json, read_json_if_any
from alpaca.text.added_tokens import AddedToken, SpecialNames, read_added_tokens, read_special_names
from alpaca.text.chat.files import TEMPLATE_FILE
from alpaca.text.markers import MarkedEncoder
from alpaca.text.tokenizer import PAD_TOKEN, Tokenizer, tokenizer_summary
from alpaca.text.written import add_listed, read_written

logger = logging.getLogger(__name__)
LLAMA_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SPACE = "▁"  # SentencePiece's visible space


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece itself, plus the tokens that fine-tuning added to its vocabulary (`[PAD]`, `<|im_end|>`).

    Ordinary added tokens are found in a text before SentencePiece sees it. Then, and only then, the text goes through
    the `tokenizers` library, with the spaces around such tokens as AutoTokenizer has them.
    """

    def __init__(
        self,
        model_file: Path,
        *,
        added: Mapping[str, int] | None = None,
        listed: Iterable[AddedToken] = (),
        names: SpecialNames | None = None,
        prefixes_all: bool = False,
        adds_space: bool = True,
        written: Path | None = None,
    ) -> None:
        """Opens the model. Raises InputError for a damaged file or one without EOS.

        added: special tokens and their ids.   listed: added tokens with all that the folder says of them.
        names: the special tokens the folder names; what cannot be right is not followed.
        prefixes_all: text after an added token gets the space in front, too, not only the beginning.
        adds_space: False: no text gets a space in front, whatever the model says.
        written: the tokenizer.json beside the model, which says how a conversation is cut around control tokens.
        """
        from sentencepiece import SentencePieceProcessor

        self.model_file = Path(model_file)
        try:
            self._processor = SentencePieceProcessor(model_file=str(model_file))
            self._proto = _read_proto(self.model_file, adds_space=adds_space)
            if not adds_space:
                self._processor = SentencePieceProcessor(model_proto=self._proto.SerializeToString())
        except (RuntimeError, OSError) as error:
            raise InputError(f"{model_file} is no SentencePiece model, or a damaged one: {error}") from error
        self.base_size = self._processor.get_piece_size()
        special = (AddedToken(token_id=i, content=token) for token, i in (added or {}).items() if i >= self.base_size)
        self._listed = {token.content: self._renumber(token) for token in [*special, *listed]}
        self._prefixes_all, self._adds_space, self._written = prefixes_all, adds_space, written
        self._set_special_tokens(names or SpecialNames(roles={}))
        self._backend = self._make_backend() if any(not token.special for token in self._listed.values()) else None

    def id_of(self, token: str | None) -> int | None:
        """The id of a token, the model's own or an added one; None where there is no such token."""
        if not token:
            return None
        if token in self._listed:
            return self._listed[token].token_id
        token_id = self._processor.piece_to_id(token)  # of an unknown piece: that of <unk>
        return token_id if self._processor.id_to_piece(token_id) == token else None

    @property
    def end_ids(self) -> frozenset[int]:
        return frozenset(token_id for token_id in (self.eos_id, self._processor.eos_id()) if token_id >= 0)

    def is_unknown(self, token_id: int) -> bool:
        return token_id < self.base_size and self._processor.is_unknown(token_id)

    def special_id(self, text: str) -> int | None:
        token_id = self.id_of(text)
        return token_id if token_id in self.special_ids else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            return self._processor.encode(list(texts), num_threads=-1)
        return [encoded.ids for encoded in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    @cached_property
    def marked_encoder(self) -> MarkedEncoder:
        listed = list(self._listed.values())
        if self._written is not None:
            backend = read_written(self._written, listed)
        else:
            backend = _build_backend(self._proto, self.model_file, listed, prefixes_all=self._prefixes_all)
            backend.normalizer = None
            _find_spaces_as_auto_tokenizer(backend, self._proto.normalizer_spec, prefixes_all=self._prefixes_all)
        own = (token.content for token in backend.get_added_tokens_decoder().values() if token.special)
        return MarkedEncoder(backend, [*own, *(token.content for token in listed if token.special)])

    def decode(self, ids: Sequence[int]) -> str:
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    @property
    def drops_first_space(self) -> bool:
        return self._proto.normalizer_spec.add_dummy_prefix

    @cached_property
    def most_characters_per_token(self) -> int | None:
        spec, kinds = self._proto.normalizer_spec, self._proto.SentencePiece
        shortens = spec.precompiled_charsmap or spec.remove_extra_whitespaces
        knows_all = any(piece.type == kinds.BYTE for piece in self._proto.pieces)
        added = self._listed.values()
        if shortens or not knows_all or any(token.lstrip or token.rstrip for token in added):
            return None
        return max(map(len, [*(piece.piece for piece in self._proto.pieces), *(token.content for token in added)]))

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def add_pad_token(self) -> bool:
        if self.pad_id is not None:
            return False
        self.pad_id = self.size
        self._listed[PAD_TOKEN] = AddedToken(token_id=self.pad_id, content=PAD_TOKEN)
        self.special_ids |= {self.pad_id}
        self.size += 1
        return True

    def save(self, folder: Path, *, max_length: int | None = None) -> None:
        tokens = {token.token_id: token.content for token in self._listed.values()}
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        is_own = {self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id(), None}
        named = {role: tokens.get(i) or self._processor.id_to_piece(i) for role, i in roles.items() if i not in is_own}
        write_llama_tokenizer(
            self.model_file,
            folder,
            listed=self._listed.values(),
            names=SpecialNames(roles=named, adds_bos=bool(self.prefix_ids)),
            prefixes_all=self._prefixes_all,
            adds_space=self._adds_space,
            max_length=max_length,
        )
        if self.chat_template is not None:
            write_text(folder / TEMPLATE_FILE, self.chat_template.source)

    def _set_special_tokens(self, names: SpecialNames) -> None:
        """Sets the ids of the special tokens. What `names` says is not followed where it is a known mistake."""
        own_bos, own_eos, own_pad = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        eos_id = self._believed(names.roles.get("eos_token"), other=own_bos, own=own_eos)
        if eos_id is None:
            raise InputError(
                f"{self.model_file} has no EOS token, and its folder's tokenizer_config.json names none that there "
                'is: add "eos_token" to it'
            )
        self.eos_id = eos_id
        self.bos_id = self._believed(names.roles.get("bos_token"), other=own_eos, own=own_bos)
        self.pad_id = own_pad if own_pad >= 0 else self.id_of(names.roles.get("pad_token"))
        self.prefix_ids = [] if self.bos_id is None or names.adds_bos is False else [self.bos_id]
        listed = self._listed.values()
        self.size = max([self.base_size - 1, *(token.token_id for token in listed)]) + 1
        controls = {i for i in range(self.base_size) if self._processor.is_control(i)}
        named = {self.id_of(token) for token in names.roles.values()} - {self._processor.unk_id(), None}
        ordinary = {token.token_id for token in listed if not token.special}
        special = {token.token_id for token in listed if token.special and not self.is_unknown(token.token_id)}
        self.named_tokens = self._name_tokens(names)
        self.special_ids = frozenset((controls - ordinary) | special | named | {eos_id})
        own = {i: self._piece_bytes(i) for i in range(self.base_size)}
        shown = {**own, **{token.token_id: token.content.encode() for token in listed if not token.special}}
        self._bytes = [b"" if i in self.special_ids else shown.get(i, b"") for i in range(self.size)]

    def _name_tokens(self, names: SpecialNames) -> dict[str, str]:
        """The special tokens by role: the folder's, but BOS and EOS as they are believed."""
        texts = {token.token_id: token.content for token in self._listed.values()}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._processor.unk_id()}
        found = {role: texts.get(i) or self._processor.id_to_piece(i) for role, i in ids.items() if i is not None}
        return {**names.roles, **found}

    def _renumber(self, token: AddedToken) -> AddedToken:
        """The token under the id of the model's own piece of that name: AutoTokenizer adds no second one."""
        token_id = self._processor.piece_to_id(token.content)
        is_own = self._processor.id_to_piece(token_id) == token.content
        return replace(token, token_id=token_id) if is_own else token

    def _believed(self, named: str | None, *, other: int, own: int) -> int | None:
        """The id that the folder's name for BOS or EOS has, or the model's own where that cannot be right.

        A name without an id, <unk>, and the other one of the two are mistakes that early conversions of LLaMA made.
        """
        token_id = self.id_of(named)
        if token_id is not None and token_id != other and not self.is_unknown(token_id):
            return token_id
        return own if own >= 0 else None

    def _make_backend(self):
        backend = _build_backend(
            self._proto, self.model_file, list(self._listed.values()), prefixes_all=self._prefixes_all
        )
        backend.encode_special_tokens = True  # in a user's text they are text
        return backend

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


def describe_other_vocabulary(folder: Path) -> str | None:
    """How the folder's tokenizer.json differs from its tokenizer.model; None where they have the same vocabulary.

    Where they differ, a fine-tune renamed or added pieces in the file that its tools read, which is tokenizer.json.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    written = read_json(folder / "tokenizer.json")
    vocabulary = (written.get("model") or {}).get("vocab") or {}
    ids = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, *_) in enumerate(vocabulary)}
    added = {entry["id"]: entry["content"] for entry in written.get("added_tokens") or []}
    pieces = [piece.piece for piece in _read_proto(folder / "tokenizer.model").pieces]
    for piece, token_id in [*ids.items(), *((content, token_id) for token_id, content in added.items())]:
        own = pieces[token_id] if token_id < len(pieces) else added.get(token_id)
        if own != piece:
            return f"id {token_id} is {piece!r} in tokenizer.json and {own!r} in tokenizer.model"
    return None


def load_sentencepiece(folder: Path, model_file: Path) -> SentencePieceTokenizer:
    """The tokenizer of a folder whose tokenizer.model holds. Raises InputError."""
    names = read_special_names(folder)
    config = read_json_if_any(folder / "tokenizer_config.json")
    tokenizer = SentencePieceTokenizer(
        model_file,
        listed=read_added_tokens(folder, names).values(),
        names=names,
        prefixes_all=config.get("legacy") is True,
        adds_space=config.get("add_prefix_space") is not False,
        written=folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None,
    )
    right = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    wrong = {
        role: names.roles[role]
        for role, token_id in right.items()
        if role in names.roles and tokenizer.id_of(names.roles[role]) != token_id
    }
    if wrong:
        said = ", ".join(f"{key} is {value!r}" for key, value in wrong.items())
        logger.warning("%s says %s; its tokenizer.model is right: %s", folder, said, tokenizer_summary(tokenizer))
    return tokenizer


# Writing a SentencePiece model as tokenizer.json ----------------------------------------------------------------


def write_llama_tokenizer(
    model_file: Path,
    folder: Path,
    *,
    added: Mapping[str, int] | None = None,
    listed: Iterable[AddedToken] = (),
    names: SpecialNames | None = None,
    pad_token: str | None = None,
    prefixes_all: bool = False,
    adds_space: bool = True,
    max_length: int | None = None,
) -> None:
    """Write LLAMA_TOKENIZER_FILES into `folder`; the parameters are those of SentencePieceTokenizer.

    Through AutoTokenizer they give SentencePiece's ids for any text but literal special tokens, which stay special so
    that programs that append `eos_token` as text get EOS. The class is named PreTrainedTokenizerFast because
    transformers' LlamaTokenizer would rebuild the pipeline and lose leading spaces. Raises InputError.
    """
    proto = _read_proto(model_file, adds_space=adds_space)
    tokens = [AddedToken(token_id=token_id, content=token) for token, token_id in (added or {}).items()]
    tokens = sorted([*tokens, *listed], key=lambda token: token.token_id)
    roles = {f"{name}_token": proto.pieces[token_id].piece for name, token_id in _special_ids(proto).items()}
    roles |= names.roles if names else {}
    if pad_token:
        roles["pad_token"] = pad_token
    adds_bos = "bos_token" in roles and (names is None or names.adds_bos is not False)
    backend = _build_backend(proto, model_file, tokens, prefixes_all=prefixes_all)
    _set_prefix(backend, roles["bos_token"] if adds_bos else None)
    if model_file.absolute() != (folder / "tokenizer.model").absolute():
        shutil.copyfile(model_file, folder / "tokenizer.model")
    write_text(folder / "tokenizer.json", backend.to_str(pretty=False))
    write_json(folder / "special_tokens_map.json", roles)
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "split_special_tokens": False,
        **roles,
    }
    if prefixes_all:
        config["legacy"] = True
    if not adds_space:
        config["add_prefix_space"] = False
    if max_length:
        config["model_max_length"] = max_length
    write_json(folder / "tokenizer_config.json", config)


def _read_proto(model_file: Path, *, adds_space: bool = True):
    """The model's message. adds_space: False: it says that no text gets a space in front."""
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
    proto.normalizer_spec.add_dummy_prefix &= adds_space
    return proto


def _special_ids(proto) -> dict[str, int]:
    spec = proto.trainer_spec
    ids = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id}
    return {name: token_id for name, token_id in ids.items() if token_id >= 0}


def _build_backend(proto, model_file: Path, added: Sequence[AddedToken], *, prefixes_all: bool = False):
    """A `tokenizers` pipeline that does what SentencePiece's BPE does, and finds added tokens first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    kinds = proto.SentencePiece
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise InputError(f"{model_file} is not a BPE model, which LLaMA's tokenizer is")
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    if not _get_ids_in_order(vocabulary, added):
        ids = {token.token_id for token in added}
        vocabulary = {piece: token_id for piece, token_id in vocabulary.items() if token_id not in ids}
        vocabulary |= {token.content: token.token_id for token in added}
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    bytes_fall_back = any(piece.type == kinds.BYTE for piece in proto.pieces)
    merges = _merges(proto)
    backend = Backend(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_fall_back))
    adds_space = proto.normalizer_spec.add_dummy_prefix
    if any(not token.special for token in added):
        _find_spaces_as_auto_tokenizer(backend, proto.normalizer_spec, prefixes_all=prefixes_all)
    else:
        backend.normalizer = _normalizer(proto.normalizer_spec)
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_tokens(backend, proto, added)
    if any(piece.type == kinds.USER_DEFINED for piece in proto.pieces):
        logger.warning("%s has user-defined symbols; text around them may differ through AutoTokenizer", model_file)
    return backend


def _get_ids_in_order(vocabulary: Mapping[str, int], added: Sequence[AddedToken]) -> bool:
    """Whether `tokenizers`, which numbers added tokens itself, comes to the ids that these have."""
    new = [token.token_id for token in added if vocabulary.get(token.content) != token.token_id]
    return new == [*range(len(vocabulary), len(vocabulary) + len(new))]


def _add_tokens(backend, proto, added: Sequence[AddedToken]) -> None:
    from tokenizers import AddedToken as Added

    kinds = proto.SentencePiece
    own = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    listed = {token.content for token in added}
    backend.add_special_tokens([Added(token, normalized=False, special=True) for token in own if token not in listed])
    add_listed(backend, added)


def _set_prefix(backend, bos: str | None) -> None:
    from tokenizers import processors

    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )


def _find_spaces_as_auto_tokenizer(backend, spec, *, prefixes_all: bool) -> None:
    """Put the space in front as transformers' LlamaTokenizer does: never before a space, nor after an added token.

    (With `legacy` in its config it does so after added tokens, too.)
    """
    from tokenizers import normalizers, pre_tokenizers

    steps = _normalizing_steps(spec)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = ("always" if prefixes_all else "first") if spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)


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
    from tokenizers import normalizers

    steps = _normalizing_steps(spec)
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _normalizing_steps(spec) -> list:
    from tokenizers import Regex, normalizers

    steps: list = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps

"""The interface that every tokenizer offers to the rest of the program.

In user text a special token is text; BOS and EOS are added by id.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from alpaca.errors import InputError, UnsupportedModel
from alpaca.text.chat.files import ChatTemplate
from alpaca.text.markers import MarkedEncoder

logger = logging.getLogger(__name__)
PAD_TOKEN = "[PAD]"  # what the original recipe adds when a tokenizer has no padding token


class Tokenizer(ABC):
    """The methods that training, serving and data use of a tokenizer.

    prefix_ids: what stands before every text (BOS, for most).   size: number of ids, added tokens included.
    special_ids: ids that stand for no text.                      base_size: without the added tokens.
    named_tokens: special tokens by role (bos_token, eos_token …), as a chat template may ask for them.
    chat_template: the one in the tokenizer's folder, if there is one.
    trained_prompt: the prompt that the model in that folder was trained with, where the folder says so.
    pad_id, bos_id: None where there is none.                     eos_id: the one that training puts after an answer.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int | None
    size: int
    base_size: int
    prefix_ids: list[int]
    special_ids: frozenset[int]
    named_tokens: Mapping[str, str]
    chat_template: ChatTemplate | None = None
    trained_prompt: str | None = None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without prefix or EOS; literal special tokens in the text stay text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence; special tokens add nothing to it."""

    @abstractmethod
    def add_pad_token(self) -> bool:
        """Add `[PAD]` as the last id where there is no padding token; true if it was added."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write files that `load_tokenizer` and AutoTokenizer read back to the same ids."""

    @property
    def fill_id(self) -> int:
        """The id that fills rows up, masked and without loss: the padding token's, or EOS where there is none."""
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

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer as far as the tokenizer knows: EOS, and the model file's own if that differs."""
        return frozenset([self.eos_id])

    def is_unknown(self, token_id: int) -> bool:
        """Whether an id is that of <unk>, which stands for no token and ends nothing."""
        return False

    @property
    def marked_encoder(self) -> MarkedEncoder:
        """Tokenizes a conversation, whose template has control tokens while its contents have none."""
        raise UnsupportedModel("this model's kind of tokenizer takes no messages: give prompt")

    @property
    def drops_first_space(self) -> bool:
        """Whether a space at the very beginning of a decoded text is the tokenizer's own and not part of the text."""
        return False

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written so; None where the text names no special token."""
        return None

    @property
    def most_characters_per_token(self) -> int | None:
        """Characters of a text that one token stands for at most; None where it may be any number.

        So it is where the tokenizer first drops or joins characters, or makes one token of all that it does not know.
        """
        return None

    def token_bytes(self, token_id: int) -> bytes | None:
        """The UTF-8 bytes one id stands for, or None where that depends on its neighbours."""
        return None

    def bytes_inside(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one id adds to a text that has begun; none for a special token."""
        return self.token_bytes(token_id) or b""


def tokenizer_summary(tokenizer: Tokenizer) -> str:
    """Describe a tokenizer in one line of a log."""
    ids = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "PAD": tokenizer.pad_id}
    return f"{tokenizer.size} tokens, " + json.dumps(ids)

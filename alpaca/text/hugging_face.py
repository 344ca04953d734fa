"""Tokenizers of transformers, for folders without a SentencePiece model: Llama 3, OPT, BLOOM and others."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from alpaca.errors import InputError, MissingInput
from alpaca.files.reading import list_folder
from alpaca.text.tiktoken import TIKTOKEN_FILE
from alpaca.text.tokenizer import PAD_TOKEN, Tokenizer


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
        """One more than the highest id: a vocabulary may leave ids out, so its length would be too small."""
        return max(self._tokenizer.get_vocab().values()) + 1


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

"""Loads the tokenizer that a model folder has, and finds the ids that end an answer."""

from pathlib import Path

from alpaca.errors import InputError, MissingInput
from alpaca.files.reading import read_json
from alpaca.text.hugging_face import HuggingFaceTokenizer
from alpaca.text.sentencepiece import SentencePieceTokenizer, is_sentencepiece, load_sentencepiece
from alpaca.text.tiktoken import is_tiktoken
from alpaca.text.tokenizer import Tokenizer


def read_eos_ids(folder: Path, tokenizer: Tokenizer, *, vocab_size: int) -> frozenset[int]:
    """The EOS ids: the tokenizer's, and those of the folder's configs unless these are known to be wrong.

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
        return load_sentencepiece(folder, model_file)
    if model_file.is_file() and not is_tiktoken(model_file):
        raise InputError(
            f"{model_file} ({model_file.stat().st_size} bytes) is neither a SentencePiece model (LLaMA 1, 2) nor a "
            "tiktoken file (Llama 3): it is damaged, cut short or a Git LFS pointer. Copy the model's own again"
        )
    if model_file.is_file() and not (folder / "tokenizer.json").is_file():
        raise MissingInput(
            f"{folder} has Llama 3's tokenizer.model but no tokenizer.json; convert.convert_llama_weights_to_hf "
            "writes one, or copy the one of the model's Hugging Face repository"
        )
    return HuggingFaceTokenizer(folder)

"""Loads the tokenizer that a model folder has: decides which of its files holds."""

import logging
from pathlib import Path

from alpaca.errors import InputError, MissingInput
from alpaca.files.reading import read_json
from alpaca.text.added_tokens import read_added_tokens
from alpaca.text.chat.files import read_chat_template
from alpaca.text.chat.trained_prompt import read_trained_prompt
from alpaca.text.hugging_face import HuggingFaceTokenizer
from alpaca.text.sentencepiece import describe_other_vocabulary, is_sentencepiece, load_sentencepiece
from alpaca.text.tiktoken import is_tiktoken
from alpaca.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: SentencePiece's when its `tokenizer.model` holds, else Hugging Face's.

    A `tokenizer.model` holds unless a `tokenizer.json` beside it has another vocabulary or ordinary added tokens: then
    a fine-tune changed the latter, and the former was left as it came. Known bad configs (class LLaMATokenizer,
    bos = eos = unk) do no harm to the first kind; where they differ from it is logged. Raises MissingInput, InputError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingInput(f"no tokenizer folder {folder}")
    tokenizer = _load(folder)
    tokenizer.chat_template = read_chat_template(folder)
    tokenizer.trained_prompt = read_trained_prompt(folder)
    return tokenizer


def _load(folder: Path) -> Tokenizer:
    model_file = folder / "tokenizer.model"
    if model_file.is_file() and is_sentencepiece(model_file):
        return HuggingFaceTokenizer(folder) if _is_outdated(folder) else load_sentencepiece(folder, model_file)
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


def _is_outdated(folder: Path) -> bool:
    """Whether tokenizer.json, and not the SentencePiece model beside it, says how the model's texts are cut.

    Ordinary tokens that tokenizer.json does not list are found beside the SentencePiece model just as well.
    """
    if not (folder / "tokenizer.json").is_file():
        return False
    difference = describe_other_vocabulary(folder)
    if difference:
        logger.warning("%s: %s; tokenizer.json holds, as a fine-tune changed it", folder, difference)
    ordinary = {token.content: token.token_id for token in read_added_tokens(folder).values() if not token.special}
    entries = read_json(folder / "tokenizer.json").get("added_tokens") or ()
    written = {entry["content"]: entry["id"] for entry in entries}
    return difference is not None or bool(ordinary and ordinary.items() <= written.items())

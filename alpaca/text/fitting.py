"""Tokenizes a text that may be far too long, without spending more than a context's worth of work on it."""

from collections.abc import Callable

from alpaca.errors import PromptTooLong
from alpaca.text.tokenizer import Tokenizer

_PIECE_CHARACTERS = 1 << 16
_MOST_CUT = 256  # further tokens that a cut through a token makes, at most: its characters, one by one


def encode_within(
    tokenizer: Tokenizer, text: str, most_tokens: int, *, encode: Callable[[str], list[int]] | None = None
) -> list[int]:
    """The ids of a text, or PromptTooLong where it has more than `most_tokens` for certain.

    A text with too many characters for the vocabulary's longest token is refused at once. Of any other the beginning is
    looked at, a piece at a time: so a refusal costs no more than what it takes to tokenize one piece and the longest
    text that fits. A text only a little too long is not noticed here: its ids are returned.

    encode: another way to tokenize than the tokenizer's own.
    """
    encode = encode or tokenizer.encode
    refuse_by_characters(tokenizer, len(text), most_tokens)
    if len(text) > _PIECE_CHARACTERS:
        _refuse_long_beginning(encode, text, most_tokens)
    return encode(text)


def refuse_by_characters(tokenizer: Tokenizer, num_characters: int, most_tokens: int) -> None:
    """Raise PromptTooLong for more characters than `most_tokens` tokens can have."""
    longest = tokenizer.most_characters_per_token
    if longest and num_characters > most_tokens * longest:
        raise PromptTooLong(
            f"the prompt is {num_characters:,} characters long; the model's context is {most_tokens:,} tokens, of at "
            f"most {longest} characters each: shorten the prompt"
        )


def _refuse_long_beginning(encode: Callable[[str], list[int]], text: str, most_tokens: int) -> None:
    num_tokens = 0
    for start in range(0, len(text), _PIECE_CHARACTERS):
        piece = text[start : start + _PIECE_CHARACTERS]
        num_tokens += max(0, len(encode(piece)) - _MOST_CUT)
        if num_tokens > most_tokens:
            raise PromptTooLong(
                f"the prompt is {len(text):,} characters long, of which the first {start + len(piece):,} have over "
                f"{num_tokens:,} tokens; the model's context is {most_tokens:,} tokens: shorten the prompt"
            )

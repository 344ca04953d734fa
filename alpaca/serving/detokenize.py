"""Turns token ids into text as they come: whole characters only, cut before the first stop text."""

import codecs
from collections.abc import Sequence

from alpaca.serving.stops import StopTexts
from alpaca.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 4  # of the prompt that show, so that the first new token is decoded as a continuation
_MOST_BEFORE = 8  # further tokens of the prompt in which the start of a character is looked for
_MOST_HELD = 32  # tokens; beyond it, bytes that make no character are let through


class CompletionText:
    """The text of one completion: the pieces that `push` and `finish` return, put together.

    With `strip_leading`, white space at the beginning is dropped first. The text ends before the stop text that is
    complete first, and of several that end with the same character before the longest; or where the special token comes
    that has a stop text for a name, which shows no text. A piece that could be the beginning of a stop text is held
    back until more text decides it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, stop: Sequence[str] = (), strip_leading: bool = False
    ) -> None:
        self.stopped_by: str | None = None  # the stop text that ended it
        self.is_cut = False  # whether a stop text was found among its characters, which ends it before them
        self.num_given = 0  # characters of the text that were returned
        self._decoder = _decoder(tokenizer, prompt_ids)
        self._stops, self._state = StopTexts(stop), 0
        special_ids = ((tokenizer.special_id(text), text) for text in stop)
        self._stop_ids = {token_id: text for token_id, text in special_ids if token_id is not None}
        self._at_start = strip_leading
        self._waiting = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended it."""
        return self.stopped_by is not None

    @property
    def num_read(self) -> int:
        """Number of characters read so far, those held back included."""
        return self.num_given + len(self._waiting)

    def push(self, token_id: int) -> str:
        """The further text that is certain after one more token."""
        if self.stopped:
            return ""
        if token_id not in self._stop_ids:
            return self._release(self._decoder.push(token_id), last=False)
        piece = self._release(self._decoder.finish(), last=True)
        self.stopped_by = self.stopped_by or self._stop_ids[token_id]
        return piece

    def finish(self) -> str:
        """The text that was held back, when no more tokens follow."""
        return "" if self.stopped else self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        for num_read, character in enumerate(text, start=1):
            self._state = self._stops.step(self._state, character)
            if length := self._stops.matches[self._state]:
                read = self._waiting + text[:num_read]
                self.stopped_by, self.is_cut, self._waiting = read[-length:], True, ""
                return self._give(read[:-length])
        self._waiting += text
        end = len(self._waiting) - (0 if last else self._stops.lengths[self._state])
        piece, self._waiting = self._waiting[:end], self._waiting[end:]
        return self._give(piece)

    def _give(self, piece: str) -> str:
        self.num_given += len(piece)
        return piece


class _BytesDecoder:
    """For tokenizers in which each id stands for certain bytes (SentencePiece)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # A text's first piece carries the space SentencePiece puts there; a continuation's space is the model's.
        self._drop_space = tokenizer.drops_first_space and all(i in tokenizer.special_ids for i in prompt_ids)

    def push(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            data, self._drop_space = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For any other tokenizer: decodes with and without the new tokens, after a few tokens of context, and compares.

    A token of a byte-level vocabulary may end one character and begin the next. So an incomplete character at the end
    of the text is held back, and the text before it is not. Special tokens show no text, and at the beginning of a text
    some tokenizers drop a space: so the context always holds a token that shows, once there was one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = _context(tokenizer, prompt_ids)
        self._new: list[int] = []
        self._num_given = 0  # characters of the new tokens' text

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return ""
        self._new.append(token_id)
        text = self._grown()
        whole = text.rstrip("\ufffd")
        if whole != text and len(self._new) < _MOST_HELD:
            return self._give(whole)
        piece = self._give(text)
        self._context, self._new, self._num_given = self._new, [], 0
        return piece

    def finish(self) -> str:
        return self._give(self._grown()) if self._new else ""

    def _give(self, text: str) -> str:
        piece, self._num_given = text[self._num_given :], max(self._num_given, len(text))
        return piece

    def _grown(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._new)[len(before) :]


def _context(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt that show text, from the start of a character on.

    Bytes that make no character are shown as U+FFFD each, a whole run of them where one is amiss. So the right start
    gives the fewest.
    """
    shown: list[int] = []
    for token_id in reversed(prompt_ids):
        if token_id not in tokenizer.special_ids:
            shown.append(token_id)
        if len(shown) == _CONTEXT_TOKENS + _MOST_BEFORE:
            break
    shown.reverse()
    best, fewest = shown, len(shown) + 1
    for start in range(max(0, len(shown) - _CONTEXT_TOKENS), -1, -1):
        context = shown[start:]
        num_broken = tokenizer.decode(context).count("\ufffd")
        if num_broken < fewest:
            best, fewest = context, num_broken
        if num_broken == 0:
            break
    return best


def _decoder(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> _BytesDecoder | _WindowDecoder:
    if tokenizer.token_bytes(tokenizer.eos_id) is None:
        return _WindowDecoder(tokenizer, prompt_ids)
    return _BytesDecoder(tokenizer, prompt_ids)

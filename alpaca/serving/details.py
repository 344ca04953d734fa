"""Answers as JSON documents: text, why it ended, counts, and the log-probabilities that were asked for.

A token belongs to the piece in which its text begins. So the documents of a stream, put together, list the same tokens
as the document of the whole answer, and a token that a stop text cut away is in none.
"""

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import Event, FinishedEvent, Generation, TokenEvent, TokenScore, advance, in_order
from alpaca.text.tokenizer import Tokenizer

_NEVER = -9999.0  # JSON has no minus infinity: the log-probability of a token that cannot come

Entry = dict[str, Any]


def stream_details(generation: Generation, text: CompletionText, tokenizer: Tokenizer) -> Iterator[str]:
    """A single completion as documents, one a piece, each as soon as it is certain. The last one says why it ended."""
    completion = _Completion(0, generation, text, TokenWriter(tokenizer))
    is_first = True
    for batch in generation.batches():
        piece = "".join(map(completion.advance, batch))
        if piece or completion.has_ended:
            yield completion.document(piece, has_prompt=is_first)
            is_first = False


def complete_details(generation: Generation, texts: list[CompletionText], tokenizer: Tokenizer) -> Iterator[str]:
    """A document of each completion, in order, as soon as it and those before it have ended."""
    writer = TokenWriter(tokenizer)
    completions = [_Completion(index, generation, text, writer) for index, text in enumerate(texts)]
    wholes = in_order(generation, lambda event: completions[event.completion].advance(event))
    for completion, whole in zip(completions, wholes, strict=True):
        yield completion.document(whole, has_prompt=True)


class TokenWriter:
    """Writes tokens as entries of a document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def entry(self, token_id: int, score: TokenScore | None) -> Entry:
        """A token, its log-probability, and the most likely ones in its place; without a score, null and none."""
        if score is None:
            return {**self._token(token_id, None), "top": []}
        top = [self._token(other, logprob) for other, logprob in score.top]
        return {**self._token(token_id, score.logprob), "top": top}

    def _token(self, token_id: int, logprob: float | None) -> Entry:
        data = self._tokenizer.bytes_inside(token_id)
        return {
            "id": token_id,
            "text": data.decode("utf-8", errors="replace"),
            "bytes": list(data),
            "logprob": None if logprob is None else max(logprob, _NEVER),
        }


class _Completion:
    """What is known of one completion, and which of its tokens no document has listed yet."""

    def __init__(self, index: int, generation: Generation, text: CompletionText, writer: TokenWriter) -> None:
        self.has_ended = False
        self._index, self._generation, self._text, self._writer = index, generation, text, writer
        self._num_tokens = 0
        self._waiting: deque[tuple[int, Entry]] = deque()  # where a token's text begins, and its entry

    def advance(self, event: Event) -> str:
        """The further text that is certain after one event."""
        text, start, was_stopped = self._text, self._text.num_read, self._text.stopped
        piece = advance(self._generation, text, event)
        self.has_ended |= isinstance(event, FinishedEvent)
        if isinstance(event, TokenEvent) and not was_stopped:
            self._num_tokens += 1
            ends_by_itself = text.stopped and not text.is_cut  # a special token, which a stop text names
            if event.score is not None and not ends_by_itself:
                self._waiting.append((start, self._writer.entry(event.token_id, event.score)))
        return piece

    def document(self, piece: str, *, has_prompt: bool) -> str:
        """The document of a piece, which is the last or the only one if the completion has ended."""
        request = self._generation.request
        document: dict[str, Any] = {"index": self._index, "text": piece}
        if self.has_ended:
            document |= {
                "finish_reason": self._generation.finish_reasons[self._index],
                "stop": self._text.stopped_by,
                "prompt_tokens": len(request.prompt_ids),
                "output_tokens": self._num_tokens,
                "seed": request.seed,
            }
        if request.logprobs is not None:
            document["logprobs"] = self._take_entries()
        if request.echo and has_prompt:
            scores = [None, *self._generation.prompt_scores]
            pairs = zip(request.prompt_ids, scores, strict=True)
            document["prompt_logprobs"] = [self._writer.entry(token_id, score) for token_id, score in pairs]
        return json.dumps(document, ensure_ascii=False, allow_nan=False)

    def _take_entries(self) -> list[Entry]:
        """The entries of tokens whose text begins in what was given so far; at the end, of all that are part of it."""
        taken = []
        is_whole = self.has_ended and not self._text.is_cut
        while self._waiting and (is_whole or self._waiting[0][0] < self._text.num_given):
            taken.append(self._waiting.popleft()[1])
        return taken

"""OpenAI's answers, whole and in pieces, from the Predictor's documents.

A document is one item of a prediction's output with `details`: a completion, or a piece of one. The last
of a completion has its finish_reason and its counts.
"""

import codecs
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from web.openai.inputs import Asked

Document = Mapping[str, Any]

_encode = json.JSONEncoder(separators=(",", ":")).encode
_MARK = "\0the text"  # no model's name has it
_END = b"data: [DONE]\n\n"
_FINISHES = {"context": "length"}  # the Predictor's other words are OpenAI's


class Answer:
    """What is known of the answer to one request. Each document goes to `events_of`, or to `add`; then ask the rest."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self.id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_choices = asked.n * len(asked.inputs)
        self._choices: dict[int, _Choice] = {}  # that have begun: the server has not refused `n` then
        self._frames: dict[int, list[bytes]] = {}  # of a choice: what stands before and after a piece's text
        self.output_tokens = 0
        self._prompt_tokens: dict[int, int] = {}

    @property
    def prompt_tokens(self) -> int:
        return sum(self._prompt_tokens.values())

    @property
    def is_complete(self) -> bool:
        has_all = len(self._choices) == self._num_choices
        return has_all and all(choice.finish_reason for choice in self._choices.values())

    def add(self, prompt: int, document: Document) -> tuple["_Choice", int]:
        """One more document of the prediction for that prompt; returns the choice it belongs to."""
        index = prompt * self._asked.n + document["index"]
        if index not in self._choices:
            self._choices[index] = _Choice(self._asked, prompt)
        choice = self._choices[index]
        choice.add(document)
        if choice.finish_reason:
            self._prompt_tokens[prompt] = document["prompt_tokens"]
            self.output_tokens += document["output_tokens"]
        return choice, index

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        kind = "chat.completion" if self._asked.is_chat else "text_completion"
        choices = [choice.whole(index) for index, choice in sorted(self._choices.items())]
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    def beginning(self) -> bytes:
        """The events that are sent before the first document's: in a chat, who speaks."""
        if not self._asked.is_chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return b"".join(event(self._chunk(index, delta=delta)) for index in range(self._num_choices))

    def events_of(self, prompt: int, document: Document) -> bytes:
        """The events for one more document."""
        choice, index = self.add(prompt, document)
        text, logprobs = choice.take()
        if not logprobs and not choice.finish_reason:
            return self._text_event(index, text) if text else b""
        return b"".join(map(event, self._chunks(index, text, logprobs, choice.finish_reason)))

    def ending(self) -> bytes:
        """The events after all others: the counts, where the client asked for them, and the mark of the end."""
        counts = {**self._chunk_head(), "choices": [], "usage": self._usage()}
        return (event(counts) if self._asked.includes_usage else b"") + _END

    def _text_event(self, index: int, text: str) -> bytes:
        """What `_chunks` gives for a text alone, which is nearly all that is sent: only the text is put in."""
        if index not in self._frames:
            (chunk,) = self._chunks(index, _MARK, None, None)
            self._frames[index] = event(chunk).split(_encode(_MARK).encode())
        before, after = self._frames[index]
        return before + _encode(text).encode() + after

    def _chunks(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> Iterator[dict[str, Any]]:
        if not self._asked.is_chat:
            yield self._chunk(index, text=text, logprobs=logprobs, finish_reason=finish_reason)
            return
        if text or logprobs:
            yield self._chunk(index, delta={"content": text}, logprobs=logprobs)
        if finish_reason:
            yield self._chunk(index, delta={}, finish_reason=finish_reason)

    def _chunk(self, index: int, *, finish_reason: str | None = None, **content: Any) -> dict[str, Any]:
        content.setdefault("logprobs", None)
        head = self._chunk_head()
        if self._asked.includes_usage:
            head["usage"] = None
        return {**head, "choices": [{"index": index, **content, "finish_reason": finish_reason}]}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self._asked.is_chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._asked.model}

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.output_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": total,
        }


class _Choice:
    """One completion: what has come of it and was not given on yet."""

    def __init__(self, asked: Asked, prompt: int) -> None:
        self._asked = asked
        self._echo = asked.echoes[prompt] if asked.echoes else ""
        self._texts = [self._echo]
        self._scored: list[Mapping[str, Any]] = []
        self._offsets = _Offsets()
        self.finish_reason: str | None = None

    def add(self, document: Document) -> None:
        self._texts.append(document["text"])
        if "prompt_logprobs" in document:
            self._scored += _of_text(document["prompt_logprobs"], self._echo)
        self._scored += document.get("logprobs") or ()
        if reason := document.get("finish_reason"):
            self.finish_reason = _FINISHES.get(reason, reason)

    def take(self) -> tuple[str, dict[str, Any] | None]:
        """Text and log probabilities since the last time."""
        text, logprobs = "".join(self._texts), self._logprobs() if self._scored else None
        self._texts, self._scored = [], []
        return text, logprobs

    def whole(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts)
        rest = {"logprobs": self._logprobs(), "finish_reason": self.finish_reason}
        if self._asked.is_chat:
            return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}, **rest}
        return {"index": index, "text": text, **rest}

    def _logprobs(self) -> dict[str, Any] | None:
        if self._asked.num_logprobs is None:
            return None
        if self._asked.is_chat:
            return {"content": [_chat_entry(entry) for entry in self._scored], "refusal": None}
        return _completion_logprobs(self._scored, self._offsets)


def _of_text(scored: Sequence[Mapping[str, Any]], prompt: str) -> list[Mapping[str, Any]]:
    """The prompt's tokens as the client's text has them, whose texts put together are the prompt.

    So without BOS, which a tokenizer puts in front, and without the blank that SentencePiece begins a text with.
    """
    tokens = list(scored)
    if tokens and not tokens[0]["bytes"]:
        del tokens[0]
    if b"".join(bytes(token["bytes"]) for token in tokens) == b" " + prompt.encode(errors="replace"):
        tokens[0] = {**tokens[0], "text": tokens[0]["text"][1:], "bytes": tokens[0]["bytes"][1:]}
    return tokens


class _Offsets:
    """Where each token begins in the text so far, in characters. One within a character begins where that does."""

    def __init__(self) -> None:
        self._decoder, self._length = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def before(self, token: bytes) -> int:
        """Where this token begins; the next begins after it."""
        offset = self._length
        self._length += len(self._decoder.decode(token))
        return offset


def _chat_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**_chat_token(entry), "top_logprobs": [_chat_token(other) for other in entry.get("top") or ()]}


def _chat_token(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": entry["text"], "logprob": entry["logprob"], "bytes": entry["bytes"]}


def _completion_logprobs(scored: Sequence[Mapping[str, Any]], offsets: _Offsets) -> dict[str, Any]:
    """Four lists side by side. A prompt's first token has no log probability where no BOS stands before it."""
    tops = [entry.get("top") for entry in scored]
    return {
        "tokens": [_token_name(entry) for entry in scored],
        "token_logprobs": [entry["logprob"] for entry in scored],
        "top_logprobs": [
            None if entry["logprob"] is None else _by_name(top or ()) for entry, top in zip(scored, tops, strict=True)
        ],
        "text_offset": [offsets.before(bytes(entry["bytes"])) for entry in scored],
    }


def _by_name(top: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The likeliest first; of tokens with one text the likeliest counts."""
    found: dict[str, float | None] = {}
    for entry in top:
        found.setdefault(_token_name(entry), entry["logprob"])
    return found


def _token_name(entry: Mapping[str, Any]) -> str:
    """A token's text; its bytes, as OpenAI spells them, where they are no whole characters."""
    try:
        bytes(entry["bytes"]).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
    return entry["text"]


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(content).encode() + b"\n\n"

"""The ways in which a transformers model can go on with a text, from the quickest to the most patient.

Which of them gives what the model itself computes is not known from its type: `proof` finds it out at start.
Legend: R rows (completions of one prompt), T tokens, V vocabulary.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

PREFILL_TOKENS = 512  # a long prompt is read in pieces, so that a cancelled request ends between them
SCORED_TOKENS = 64  # of a prompt whose logits are all wanted: so many of them are in memory at once
_STATES = ("past_key_values", "cache_params", "state", "past_buckets_states", "mems")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of decoding.

    memory: "cache" for a cache of transformers that the engine makes, "own" for whatever the model makes itself, "none"
    where every token computes the whole text again.
    in_pieces: whether a long prompt is read in pieces.   copies_rows: whether the prompt is computed once for all rows,
    and rows that ended are dropped.   rows_apart: whether each row is computed by itself.
    """

    memory: str
    in_pieces: bool = False
    copies_rows: bool = False
    rows_apart: bool = False
    cost: str = ""

    def make(self, model: PreTrainedModel, *, piece: int | None = None) -> "Decoder":
        """What decodes one request in this way.    piece: tokens of a prompt that are read at once."""
        if find_rope_kind(model.config) == "dynamic":
            _forget_lengths(model)
        if self.rows_apart:
            together = replace(self, rows_apart=False)
            return RowByRowDecoder(lambda: together.make(model, piece=piece))
        if self.memory == "none":
            return PatientDecoder(model)
        return CachedDecoder(model, self, piece=(piece or PREFILL_TOKENS) if self.in_pieces else None)


QUICKEST = Way(memory="cache", in_pieces=True, copies_rows=True)
MOST_PATIENT = Way(
    memory="none", rows_apart=True,
    cost="every token computes the whole text again, one completion after the other: the time of an answer grows with "
    "the square of its length",
)  # fmt: skip
_WHOLE = "prompts are computed whole: a cancelled request ends after its prompt, and long prompts take more memory"
_WHOLE_ROWS = "prompts are computed whole, and once for each of n completions"
_APART = "prompts are computed whole, and each of n completions by itself"
WAYS = (
    QUICKEST,
    Way(memory="cache", copies_rows=True, cost=_WHOLE),
    Way(memory="cache", cost=_WHOLE_ROWS),
    Way(memory="own", copies_rows=True, cost=f"the model keeps a memory of its own kind, and {_WHOLE}"),
    Way(memory="own", cost=f"the model keeps a memory of its own kind, and {_WHOLE_ROWS}"),
    Way(memory="cache", rows_apart=True, cost=_APART),
    Way(memory="own", rows_apart=True, cost=f"the model keeps a memory of its own kind, and {_APART}"),
    Way(
        memory="none",
        cost="every token computes the whole text again: the time of an answer grows with the square of its length",
    ),
    MOST_PATIENT,
)


class Decoder(ABC):
    """Decodes one request."""

    @abstractmethod
    def begin(self, prompt: torch.Tensor, num_rows: int, is_cancelled: Callable[[], bool]) -> torch.Tensor | None:
        """Logits [R, V] after the prompt [1, T], alike in all rows; None if the request was cancelled meanwhile."""

    @abstractmethod
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] after one more token of each row, `ids` [R]."""

    @abstractmethod
    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, counted among those that are left."""


class RowByRowDecoder(Decoder):
    """Computes each row by itself, as if it were the only one."""

    def __init__(self, make: Callable[[], Decoder]) -> None:
        self._make = make

    def begin(self, prompt: torch.Tensor, num_rows: int, is_cancelled: Callable[[], bool]) -> torch.Tensor | None:
        self._rows = [self._make() for _ in range(num_rows)]
        found = []
        for row in self._rows:
            logits = row.begin(prompt, 1, is_cancelled)
            if logits is None:
                return None
            found.append(logits)
        return torch.cat(found)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([row.step(own) for row, own in zip(self._rows, ids.split(1), strict=True)])

    def keep(self, rows: list[int]) -> None:
        self._rows = [self._rows[row] for row in rows]


class PatientDecoder(Decoder):
    """Keeps nothing but the text: every step computes all of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._forward = Forward(model)

    def begin(self, prompt: torch.Tensor, num_rows: int, is_cancelled: Callable[[], bool]) -> torch.Tensor | None:
        if is_cancelled():
            return None
        self._text = prompt.repeat(num_rows, 1)
        return self._forward.last(prompt).repeat(num_rows, 1)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        self._text = torch.cat([self._text, ids[:, None]], dim=1)
        return self._forward.last(self._text)

    def keep(self, rows: list[int]) -> None:
        self._text = self._text[rows]


class CachedDecoder(Decoder):
    """Keeps the model's memory of the text, and computes new tokens alone.

    Where the rotary factors depend on whether a text is longer than the model's old context (longrope), a text that
    grows beyond it is computed again once: the keys in the cache were turned by other factors.
    """

    def __init__(self, model: PreTrainedModel, way: Way, *, piece: int | None) -> None:
        self._model, self._way, self._piece = model, way, piece
        self._forward = Forward(model)
        self._border = find_border(model.config)
        self._recomputes = self._border is not None and find_rope_kind(model.config) == "longrope"

    def begin(self, prompt: torch.Tensor, num_rows: int, is_cancelled: Callable[[], bool]) -> torch.Tensor | None:
        text = prompt if self._way.copies_rows else prompt.repeat(num_rows, 1)
        logits = self._read(text, is_cancelled)
        if logits is None or not self._way.copies_rows:
            self._rows, self._text = list(range(num_rows)), text
            return logits
        self._text = text
        if num_rows > 1:
            self.keep([0] * num_rows)
        return logits.repeat(num_rows, 1)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        if not self._way.copies_rows:  # rows that ended are computed on, and not looked at
            ids, running = self._text[:, -1].clone(), ids
            ids[self._rows] = running
        self._text = torch.cat([self._text, ids[:, None]], dim=1)
        if self._recomputes and self._text.shape[1] == self._border + 1:
            logits = self._read(self._text, lambda: False)
        else:
            logits, self._memory = self._forward.next(ids[:, None], self._memory)
        return logits if self._way.copies_rows else logits[self._rows]

    def keep(self, rows: list[int]) -> None:
        if not self._way.copies_rows:
            self._rows = [self._rows[row] for row in rows]
            return
        self._text = self._text[rows]
        for memory in self._memory.values():
            memory.reorder_cache(torch.tensor(rows, device=self._text.device))

    def _read(self, text: torch.Tensor, is_cancelled: Callable[[], bool]) -> torch.Tensor | None:
        """Compute a text [R, T] from its beginning. Returns the logits [R, V] after it."""
        self._memory: dict[str, Any] = {}
        if self._way.memory == "cache":
            self._memory["past_key_values"] = DynamicCache(config=self._model.config)
        is_whole = self._piece is None or (self._border is not None and text.shape[1] > self._border)
        for piece in [text] if is_whole else text.split(self._piece, dim=1):
            if is_cancelled():
                return None
            logits, self._memory = self._forward.next(piece, self._memory)
        return logits


class Forward:
    """Calls a model's forward with what it takes: not every one knows `use_cache` or `logits_to_keep`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known = inspect.signature(type(model).forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in self._known.values())
        self._has_use_cache = "use_cache" in self._known or takes_any
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in self._known else {}

    def last(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] after a text [R, T], without any memory."""
        without = {"use_cache": False} if self._has_use_cache else {}
        return self._model(input_ids=text, **without, **self._only_last).logits[:, -1]

    def whole(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [R, T, V] of all tokens of a text [R, T], without any memory."""
        without = {"use_cache": False} if self._has_use_cache else {}
        return self._model(input_ids=text, **without).logits

    def next(self, ids: torch.Tensor, memory: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits [R, V] after the ids [R, T], and the memory that then holds them, too.

        Raises ValueError where the model gives none, or takes none back.
        """
        logits, given = self.next_whole(ids, memory, **self._only_last)
        return logits[:, -1], given

    def next_whole(
        self, ids: torch.Tensor, memory: dict[str, Any], **only_last: int
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """As `next`, with the logits [R, T, V] of all the ids."""
        if any(name not in self._known for name in memory):
            raise ValueError(f"its forward takes no {', '.join(memory)}")
        with_cache = {"use_cache": True} if self._has_use_cache else {}
        output = self._model(input_ids=ids, **memory, **with_cache, **only_last)
        given = {name: output.get(name) for name in _STATES if name in self._known and output.get(name) is not None}
        if not given:
            raise ValueError("it returns no memory of what it read")
        return output.logits, given


def read_logits(model: PreTrainedModel, way: Way, prompt: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits of all tokens of a prompt [1, T], some [t, V] at a time. Only for prompts that `can_score` takes."""
    if find_rope_kind(model.config) == "dynamic":
        _forget_lengths(model)
    forward, num_tokens = Forward(model), prompt.shape[1]
    if num_tokens <= SCORED_TOKENS or not _reads_in_pieces(model, way, num_tokens):
        yield forward.whole(prompt)[0]
        return
    memory: dict[str, Any] = {"past_key_values": DynamicCache(config=model.config)}
    for piece in prompt.split(SCORED_TOKENS, dim=1):
        logits, memory = forward.next_whole(piece, memory)
        yield logits[0]


def can_score(model: PreTrainedModel, way: Way, num_tokens: int) -> bool:
    """Whether `read_logits` takes so long a prompt: where it must be computed whole, its logits must not be many."""
    return num_tokens <= PREFILL_TOKENS or _reads_in_pieces(model, way, num_tokens)


def _reads_in_pieces(model: PreTrainedModel, way: Way, num_tokens: int) -> bool:
    border = find_border(model.config)
    return way.in_pieces and (border is None or num_tokens <= border)


def find_rope_kind(config: PretrainedConfig) -> str | None:
    """ "longrope" or "dynamic" where the rotary factors depend on a text's length; None elsewhere."""
    kinds = {spec.get("rope_type") for spec in _rope_specs(config)}
    return next((kind for kind in ("longrope", "dynamic") if kind in kinds), None)


def _forget_lengths(model: PreTrainedModel) -> None:
    """Make rotary factors depend on this request's length alone: "dynamic" ones keep those of the longest so far."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)


def find_border(config: PretrainedConfig) -> int | None:
    """The length beyond which the rotary factors are others; None where they never change.

    Beyond it a prompt is computed whole, as transformers' generate does it.
    """
    text = config.get_text_config(decoder=True)
    for spec in _rope_specs(config):
        if spec.get("rope_type") == "longrope":
            return spec.get("original_max_position_embeddings") or text.original_max_position_embeddings
        if spec.get("rope_type") == "dynamic":
            return spec.get("original_max_position_embeddings") or text.max_position_embeddings
    return None


def _rope_specs(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings of a config: one object, or one for each kind of layer."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    nested = [spec for spec in found.values() if isinstance(spec, dict)]
    return nested or [found]

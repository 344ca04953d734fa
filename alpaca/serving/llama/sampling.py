"""From logits to token ids, for completions that each have their own request.

The steps and their order are those of transformers: a constraint's mask, penalties and the minimum length on the
logits, then temperature, top_k, top_p, min_p. A draw inverts the cumulative distribution at a number from Python's
generator, which is seeded with the request's seed and the completion's number. So a completion is the same on every
device, alone or beside others.

Legend: R rows (completions), V vocabulary.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alpaca.errors import NumbersOverflow
from alpaca.serving.llama.step import SamplingFields, to_device, to_tensor
from alpaca.serving.request import Request
from alpaca.serving.structured.masks import forbid
from alpaca.serving.structured.matching import Matcher

_LEAST_TEMPERATURE = 1e-6  # below it only the most likely token has a chance in float32
_CHUNK = 128  # tokens whose probabilities are added up before the search for the one drawn
_FEW_TOKENS = (64, 1024)  # top_p seldom needs more of them, and finding so many is quicker than sorting all
_NEARLY_ONE = 1 - 1e-12
_MOST_TOP_K = 2**31 - 1  # more than any vocabulary, and a number that tensors hold
NOT_FINITE = -1


class SamplingState:
    """Everything that decides one completion's next token beside its logits.

    That is its request, its random numbers, the tokens it has so far, and where it stands in its constraint. A token
    counts only once it is committed (`commit_tokens`), so that a step that failed can be tried again with the same
    outcome.
    """

    def __init__(
        self, request: Request, completion: int, *, eos_ids: Iterable[int], matcher: Matcher | None = None
    ) -> None:
        self.request, self.matcher = request, matcher
        self.num_committed = 0
        self.eos_ids = sorted(eos_ids)
        self.is_penalised = bool(
            request.repetition_penalty != 1 or request.presence_penalty or request.frequency_penalty
        )
        self._generator = random.Random(f"{request.seed}:{completion}")
        self.uniform = self._generator.random()  # in [0, 1): decides the next token
        self._in_prompt: torch.Tensor | None = None  # bool [V]
        self._counts: torch.Tensor | None = None  # int32 [V]: how often each token was committed

    @property
    def mask(self) -> np.ndarray | None:
        """The tokens that its constraint allows; None where it has none."""
        return None if self.matcher is None else self.matcher.mask

    @property
    def has_own_scores(self) -> bool:
        """Whether its logits are changed in a way that no other row's are."""
        return self.is_penalised or self.matcher is not None

    @property
    def must_go_on(self) -> bool:
        """Whether the answer is shorter than `min_new_tokens`, so that no EOS may be sampled if anything else may."""
        may_only_end = self.matcher is not None and self.matcher.may_only_end
        return self.num_committed < self.request.min_new_tokens and not may_only_end

    def penalise(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores [V] with the request's penalties applied, as a new tensor."""
        if self._counts is None:
            self._in_prompt = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            ids = [token_id for token_id in self.request.prompt_ids if token_id < len(scores)]
            self._in_prompt.index_fill_(0, to_tensor(ids, torch.int64, scores.device), True)
            self._counts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        request, occurred = self.request, self._counts > 0
        if request.repetition_penalty != 1:
            less = torch.where(scores < 0, scores * request.repetition_penalty, scores / request.repetition_penalty)
            scores = torch.where(self._in_prompt | occurred, less, scores)
        return scores - request.presence_penalty * occurred - request.frequency_penalty * self._counts

    def count(self, token_id: torch.Tensor) -> None:
        """Count a token [1] for the penalties. `penalise` must have been called before."""
        self._counts.index_add_(0, token_id.clamp(min=0), self._counts.new_ones(1))

    def advance(self) -> None:
        """Go on to the next token, which another random number decides."""
        self.num_committed += 1
        self.uniform = self._generator.random()


def sample_tokens(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """The next token id of each completion: logits [R, V], changed in place, -> ids [R]. Does not wait for the device.

    Rows whose logits are not finite get NOT_FINITE. The states stay as they are until `commit_tokens`.
    """
    scores = at_least_float32(logits)
    forbid(scores, states)
    for index, state in enumerate(states):
        if state.is_penalised:
            scores[index] = state.penalise(scores[index])
    fields = to_device(sampling_fields(states), logits.device)
    eos_ids = to_tensor(states[0].eos_ids, torch.int64, logits.device)
    return sample_batch(scores, fields, eos_ids, SamplingKind.of(states))


def commit_tokens(states: Sequence[SamplingState], ids: torch.Tensor) -> None:
    """Make the sampled tokens [R] count: the next call of `sample_tokens` samples those that follow them."""
    for index, state in enumerate(states):
        if state.is_penalised:
            state.count(ids[index : index + 1])
        state.advance()


def require_finite(token_id: int) -> None:
    """Raise NumbersOverflow for NOT_FINITE, which `sample_tokens` gives where the logits are not finite."""
    if token_id == NOT_FINITE:
        raise not_finite()


def not_finite() -> NumbersOverflow:
    """The error of logits that are no numbers."""
    return NumbersOverflow(
        "the model's logits are not finite numbers: its weights are damaged or too large for the precision; "
        "set ALPACA_DTYPE to bfloat16 or float32"
    )


# All rows at once. On a GPU no value is read on the host, so that a CUDA graph can hold it ----------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingKind:
    """Which parts of sampling some row of a batch needs. The others may be left out."""

    any_greedy: bool
    any_sampled: bool
    any_filtered: bool  # by top_k, top_p or min_p
    any_must_go_on: bool

    @classmethod
    def of(cls, states: Sequence[SamplingState]) -> "SamplingKind":
        """The kind of these rows."""
        sampled = [state.request for state in states if state.request.temperature]
        return cls(
            any_greedy=len(sampled) < len(states),
            any_sampled=bool(sampled),
            any_filtered=any(request.top_k or request.top_p < 1 or request.min_p for request in sampled),
            any_must_go_on=any(state.must_go_on for state in states),
        )


def sampling_fields(states: Sequence[SamplingState]) -> SamplingFields[list]:
    """How each row is sampled, on the host."""
    requests = [state.request for state in states]
    return SamplingFields(
        temperature=[request.temperature for request in requests],
        top_k=[min(request.top_k, _MOST_TOP_K) for request in requests],
        top_p=[request.top_p for request in requests],
        min_p=[request.min_p for request in requests],
        uniform=[state.uniform for state in states],
        must_go_on=[state.must_go_on for state in states],
    )


def sample_batch(
    scores: torch.Tensor, fields: SamplingFields[torch.Tensor], eos_ids: torch.Tensor, kind: SamplingKind
) -> torch.Tensor:
    """Token ids [R] from scores [R, V] of at least float32, which are changed in place.

    eos_ids: [E] int64. kind: must name every part that some row needs; more than that costs time only.
    """
    if kind.any_must_go_on:
        banned = torch.where(fields.must_go_on, float("-inf"), 0.0).to(scores.dtype)
        scores.index_add_(1, eos_ids, banned[:, None].expand(-1, len(eos_ids)))
    chunks = in_chunks(scores)
    highest = chunks.amax(dim=-1)
    is_finite = highest.amax(dim=-1).isfinite()  # a NaN or infinity anywhere in a row makes its highest one, too
    return torch.where(is_finite, _sample_in_chunks(chunks, highest, fields, kind), NOT_FINITE)


def _sample_in_chunks(
    chunks: torch.Tensor, highest: torch.Tensor, fields: SamplingFields[torch.Tensor], kind: SamplingKind
) -> torch.Tensor:
    """Token ids [R] from scores in chunks [R, C, chunk] whose highest are [R, C].

    Rows that are not finite get any ids.
    """
    if not kind.any_sampled:
        return _most_likely(chunks, highest)
    greedy = _most_likely(chunks, highest) if kind.any_greedy else None
    # Shifted so that the highest is 0: the smallest temperature overflows nothing.
    temperature = fields.temperature.clamp(min=_LEAST_TEMPERATURE)[:, None, None]
    weights = chunks.sub_(highest.amax(dim=-1)[:, None, None]).div_(temperature).exp_()
    if kind.any_filtered:
        weights *= weights >= thresholds(weights.flatten(1), fields)[:, None, None]
    drawn = draw(weights, fields.uniform)
    return drawn if greedy is None else torch.where(fields.temperature == 0, greedy, drawn)


def in_chunks(scores: torch.Tensor) -> torch.Tensor:
    """Cut scores [R, V] into chunks [R, C, chunk]. The last chunk is filled up with tokens that cannot be sampled."""
    missing = -scores.shape[1] % _CHUNK
    if missing or not scores.is_contiguous():
        scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
    return scores.view(len(scores), -1, _CHUNK)


def _most_likely(chunks: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Each row's first highest token, from its chunks [R, C, chunk] and their highest [R, C]. Quicker than argmax."""
    chunk = highest.argmax(dim=-1)
    return chunk * _CHUNK + _chunk_of_each_row(chunks, chunk).argmax(dim=-1)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw a token of each row: the first at which the cumulative weight exceeds the share `uniform` [R] of the whole.

    Weights [R, C, chunk] -> token ids [R]. The search goes over the sums of the chunks, then inside one chunk.
    """
    cumulative = weights.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:] * _NEARLY_ONE
    # Clamped, since in a row of NaN the search runs past the end.
    chunk = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(chunk > 0, cumulative.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = _chunk_of_each_row(weights, chunk[:, 0]).cumsum(dim=-1, dtype=torch.float64)
    # Rounding may put the target past the chunk's end; a token without weight is never reached.
    within = torch.minimum(target - before, inside[:, -1:] * _NEARLY_ONE)
    place = torch.searchsorted(inside, within, right=True).clamp(max=_CHUNK - 1)
    return (chunk * _CHUNK + place)[:, 0]


def _chunk_of_each_row(chunks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The chunk number `index` [R] of each row: [R, C, chunk] -> [R, chunk]."""
    return chunks.gather(1, index[:, None, None].expand(-1, 1, _CHUNK))[:, 0]


# Filters: the least weight that top_k, top_p and min_p leave ---------------------------------------------------------


def thresholds(weights: torch.Tensor, fields: SamplingFields[torch.Tensor]) -> torch.Tensor:
    """The least weight each row keeps, [R]. Weights [R, V] are probabilities times a factor that makes the highest 1.

    top_k keeps that many tokens. top_p keeps the fewest whose probabilities, among the tokens that top_k left, add up
    to it. min_p keeps the tokens with at least that share of the highest probability. Tokens that weigh as much as the
    last one kept are kept, too.
    """
    falling, is_enough = _falling(weights, fields)
    rank = torch.arange(falling.shape[1], device=weights.device)
    has_top_k = fields.top_k[:, None] > 0
    left = falling.masked_fill(has_top_k & (rank >= fields.top_k[:, None]), 0.0)
    whole = left.sum(dim=-1, keepdim=True)
    if not is_enough:
        whole = torch.where(has_top_k, whole, weights.sum(dim=-1, keepdim=True))
    before = left.cumsum(dim=-1) - left
    is_kept = (left > 0) & ((before < fields.top_p[:, None] * whole) | (fields.top_p >= 1)[:, None])
    is_kept[:, 0] = True
    least = torch.where(is_kept, left, 1.0).amin(dim=-1)
    is_cut = (fields.top_k > 0) | (fields.top_p < 1)
    return torch.maximum(torch.where(is_cut, least, 0.0), fields.min_p.to(weights.dtype))


def _falling(weights: torch.Tensor, fields: SamplingFields[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The highest weights of each row in falling order [R, K], and whether the caller may take their sum for the whole.

    All of a row's weights are returned on a GPU; on the CPU only as many as decide every row.
    """
    if weights.device.type != "cpu":  # a look at the values would make the host wait for the device
        return weights.sort(dim=-1, descending=True).values, True
    most = max(fields.top_k.tolist())
    has_top_p = (fields.top_k == 0) & (fields.top_p < 1)
    if has_top_p.any():
        wanted = torch.where(has_top_p, fields.top_p * weights.sum(dim=-1), 0.0)
        for few in _FEW_TOKENS:
            if most <= few < weights.shape[1]:
                highest = _highest(weights, few)
                if bool((highest.sum(dim=-1) >= wanted).all()):
                    return highest, False
    elif most < weights.shape[1]:
        return _highest(weights, max(most, 1)), True
    return weights.sort(dim=-1, descending=True).values, True


def _highest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest of each row [R, V], in falling order [R, count].

    They lie in the `count` chunks with the highest maxima, so only these are searched.
    """
    chunks = weights.view(len(weights), -1, _CHUNK)
    if count < chunks.shape[1]:
        best = chunks.amax(dim=-1).topk(count, dim=-1, sorted=False).indices
        weights = chunks.gather(1, best[:, :, None].expand(-1, -1, _CHUNK)).flatten(1)
    return weights.topk(count, dim=-1).values


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """The logits as scores: float32, or float64 if they are; narrower types would round what is added to them."""
    return logits.float() if logits.dtype.itemsize < 4 else logits

"""From logits to token ids, for completions that each have their own request.

The order is transformers': penalties and the minimum length on the logits, then temperature, top_k, top_p, min_p. A
draw inverts the cumulative distribution at a number from Python's generator, seeded with (seed, completion): the same
on every device, and for a completion alone or beside others.

Legend: R rows (completions), V vocabulary.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alpaca.errors import NumbersOverflow
from alpaca.serving.request import Request

_LEAST_TEMPERATURE = 1e-6  # below it only the most likely token has a chance in float32
_CHUNK = 128  # tokens whose probabilities are added up before the search for the one drawn
_FEW_TOKENS = (64, 1024)  # top_p seldom needs more of them, and finding so many is quicker than sorting all
_NEARLY_ONE = 1 - 1e-12
_MOST_TOP_K = 2**31 - 1  # more than any vocabulary, and a number that tensors hold
NOT_FINITE = -1


class Choices:
    """What one completion's choices depend on beside its logits: its request, its random numbers, what it chose.

    A choice counts only once it is noted, so that a step that failed can be tried again with the same outcome.
    """

    def __init__(self, request: Request, completion: int, *, eos_ids: Iterable[int]) -> None:
        self.request = request
        self.num_chosen = 0
        self.eos_ids = sorted(eos_ids)
        self.is_penalised = bool(
            request.repetition_penalty != 1 or request.presence_penalty or request.frequency_penalty
        )
        self._generator = random.Random(f"{request.seed}:{completion}")
        self.uniform = self._generator.random()  # in [0, 1): decides the next choice
        self._in_prompt: torch.Tensor | None = None  # bool [V]
        self._counts: torch.Tensor | None = None  # int32 [V]: how often each token was chosen

    @property
    def must_go_on(self) -> bool:
        """Whether EOS may not be chosen yet."""
        return self.num_chosen < self.request.min_new_tokens

    def penalise(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [V] with the request's penalties."""
        if self._counts is None:
            self._in_prompt = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            ids = [token_id for token_id in self.request.prompt_ids if token_id < len(scores)]
            self._in_prompt.index_fill_(0, send(ids, torch.int64, scores.device), True)
            self._counts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        request, occurred = self.request, self._counts > 0
        if request.repetition_penalty != 1:
            less = torch.where(scores < 0, scores * request.repetition_penalty, scores / request.repetition_penalty)
            scores = torch.where(self._in_prompt | occurred, less, scores)
        return scores - request.presence_penalty * occurred - request.frequency_penalty * self._counts

    def count(self, token_id: torch.Tensor) -> None:
        """The penalties' part of a choice: a token [1] was chosen once more."""
        self._counts.index_add_(0, token_id.clamp(min=0), self._counts.new_ones(1))

    def step(self) -> None:
        """A choice is made: the next one is decided by another number."""
        self.num_chosen += 1
        self.uniform = self._generator.random()


def choose(logits: torch.Tensor, rows: Sequence[Choices]) -> torch.Tensor:
    """The next token of each completion: logits [R, V] (changed) -> ids [R]. Does not wait for the device.

    NOT_FINITE stands for the token of a row whose logits are not finite. `note` them when they are to count.
    """
    scores = at_least_float32(logits)
    for index, row in enumerate(rows):
        if row.is_penalised:
            scores[index] = row.penalise(scores[index])
    return sample(scores, SamplingBatch.of(rows, logits.device))


def note(rows: Sequence[Choices], ids: torch.Tensor) -> None:
    """These tokens [R] were chosen: the next choices follow them."""
    for index, row in enumerate(rows):
        if row.is_penalised:
            row.count(ids[index : index + 1])
        row.step()


def require_finite(token_id: int) -> None:
    """Raise NumbersOverflow for what `choose` gives where there is nothing to choose from."""
    if token_id == NOT_FINITE:
        raise NumbersOverflow(
            "the model's logits are not finite numbers: its weights are damaged or too large for the precision; "
            "set ALPACA_DTYPE to bfloat16 or float32"
        )


# All rows at once, without a look at the values: this can be captured in a CUDA graph -------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """The rows' parameters as tensors [R], and which parts of the work some row needs."""

    temperature: torch.Tensor  # float32; 0 is greedy
    top_k: torch.Tensor  # int64; 0 is off
    top_p: torch.Tensor  # float32; 1 is off
    min_p: torch.Tensor  # float32; 0 is off
    uniform: torch.Tensor  # float64, in [0, 1)
    must_go_on: torch.Tensor  # bool
    eos_ids: torch.Tensor  # [E] int64
    any_greedy: bool
    any_sampled: bool
    any_filtered: bool
    any_must_go_on: bool

    @classmethod
    def of(cls, rows: Sequence[Choices], device: torch.device) -> "SamplingBatch":
        columns = columns_of(rows)
        tensors = {name: send(values, DTYPES[name], device) for name, values in columns.items()}
        eos_ids = send(rows[0].eos_ids, torch.int64, device)
        return cls(**tensors, eos_ids=eos_ids, **flags_of(rows))


def send(values: Sequence | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values of the host as a tensor on the device. The host does not wait for the work queued there."""
    if device.type == "cpu":
        return torch.as_tensor(values, dtype=dtype)
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


DTYPES = {
    "temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32,
    "uniform": torch.float64, "must_go_on": torch.bool,
}  # fmt: skip


def columns_of(rows: Sequence[Choices]) -> dict[str, list]:
    """The tensors of a `SamplingBatch` as lists on the host, but for the EOS ids."""
    requests = [row.request for row in rows]
    return {
        "temperature": [request.temperature for request in requests],
        "top_k": [min(request.top_k, _MOST_TOP_K) for request in requests],
        "top_p": [request.top_p for request in requests],
        "min_p": [request.min_p for request in requests],
        "uniform": [row.uniform for row in rows],
        "must_go_on": [row.must_go_on for row in rows],
    }


def flags_of(rows: Sequence[Choices]) -> dict[str, bool]:
    """The flags of a `SamplingBatch`."""
    sampled = [row.request for row in rows if row.request.temperature]
    return {
        "any_greedy": len(sampled) < len(rows),
        "any_sampled": bool(sampled),
        "any_filtered": any(request.top_k or request.top_p < 1 or request.min_p for request in sampled),
        "any_must_go_on": any(row.must_go_on for row in rows),
    }


def sample(scores: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Token ids [R] from scores [R, V], which are changed in place."""
    if batch.any_must_go_on:
        banned = torch.where(batch.must_go_on, float("-inf"), 0.0).to(scores.dtype)
        scores.index_add_(1, batch.eos_ids, banned[:, None].expand(-1, len(batch.eos_ids)))
    chunks = in_chunks(scores)
    highest = chunks.amax(dim=-1)
    is_finite = highest.amax(dim=-1).isfinite()  # one NaN or infinity shows in the highest
    return torch.where(is_finite, _choose_in_chunks(chunks, highest, batch), NOT_FINITE)


def _choose_in_chunks(chunks: torch.Tensor, highest: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """`sample`, of scores in chunks [R, C, chunk] whose highest are [R, C]. Where they are no numbers, any token."""
    if not batch.any_sampled:
        return _most_likely(chunks, highest)
    greedy = _most_likely(chunks, highest) if batch.any_greedy else None
    # Shifted so that the highest is 0: the smallest temperature overflows nothing.
    temperature = batch.temperature.clamp(min=_LEAST_TEMPERATURE)[:, None, None]
    weights = chunks.sub_(highest.amax(dim=-1)[:, None, None]).div_(temperature).exp_()
    if batch.any_filtered:
        weights *= weights >= thresholds(weights.flatten(1), batch)[:, None, None]
    drawn = draw(weights, batch.uniform)
    return drawn if greedy is None else torch.where(batch.temperature == 0, greedy, drawn)


def in_chunks(scores: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R, C, chunk], the last one filled up with tokens that cannot be chosen."""
    missing = -scores.shape[1] % _CHUNK
    if missing or not scores.is_contiguous():
        scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
    return scores.view(len(scores), -1, _CHUNK)


def _most_likely(chunks: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """argmax, but quicker: the first highest of each row, from its chunks [R, C, chunk] and their highest [R, C]."""
    chunk = highest.argmax(dim=-1)
    return chunk * _CHUNK + _chunk_of_each_row(chunks, chunk).argmax(dim=-1)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the cumulative weight passes uniform [R] of the whole.

    Weights [R, C, chunk] -> [R]. The search goes over the chunks' sums, then inside one chunk.
    """
    cumulative = weights.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:] * _NEARLY_ONE
    # (clamped, since a row of NaN is past every end)
    chunk = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(chunk > 0, cumulative.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = _chunk_of_each_row(weights, chunk[:, 0]).cumsum(dim=-1, dtype=torch.float64)
    # Rounding may put the target past the chunk's end; a token without weight is never reached.
    within = torch.minimum(target - before, inside[:, -1:] * _NEARLY_ONE)
    place = torch.searchsorted(inside, within, right=True).clamp(max=_CHUNK - 1)
    return (chunk * _CHUNK + place)[:, 0]


def _chunk_of_each_row(chunks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[R, C, chunk], index [R] -> [R, chunk]."""
    return chunks.gather(1, index[:, None, None].expand(-1, 1, _CHUNK))[:, 0]


# Filters: the least weight that top_k, top_p and min_p leave ---------------------------------------------------------


def thresholds(weights: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The least weight each row keeps, [R]. Weights [R, V] are probabilities times a factor that makes the highest 1.

    top_k keeps so many; top_p the fewest whose probabilities, among those top_k left, reach it; min_p those at least
    so likely as that share of the most likely. Tokens that weigh the same as the last one kept are kept, too.
    """
    falling, is_enough = _falling(weights, batch)
    rank = torch.arange(falling.shape[1], device=weights.device)
    has_top_k = batch.top_k[:, None] > 0
    left = falling.masked_fill(has_top_k & (rank >= batch.top_k[:, None]), 0.0)
    whole = left.sum(dim=-1, keepdim=True)
    if not is_enough:
        whole = torch.where(has_top_k, whole, weights.sum(dim=-1, keepdim=True))
    before = left.cumsum(dim=-1) - left
    is_kept = (left > 0) & ((before < batch.top_p[:, None] * whole) | (batch.top_p >= 1)[:, None])
    is_kept[:, 0] = True
    least = torch.where(is_kept, left, 1.0).amin(dim=-1)
    is_cut = (batch.top_k > 0) | (batch.top_p < 1)
    return torch.maximum(torch.where(is_cut, least, 0.0), batch.min_p.to(weights.dtype))


def _falling(weights: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, bool]:
    """Each row's weights in falling order [R, K], and whether their sums are all that is wanted.

    On the CPU these are as few as decide every row.
    """
    if weights.device.type != "cpu":  # a look at the values would make the host wait for the device
        return weights.sort(dim=-1, descending=True).values, True
    most = max(batch.top_k.tolist())
    has_top_p = (batch.top_k == 0) & (batch.top_p < 1)
    if has_top_p.any():
        wanted = torch.where(has_top_p, batch.top_p * weights.sum(dim=-1), 0.0)
        for few in _FEW_TOKENS:
            if most <= few < weights.shape[1]:
                highest = _highest(weights, few)
                if bool((highest.sum(dim=-1) >= wanted).all()):
                    return highest, False
    elif most < weights.shape[1]:
        return _highest(weights, max(most, 1)), True
    return weights.sort(dim=-1, descending=True).values, True


def _highest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest of each row [R, V], in falling order [R, count]: they are in the chunks with the highest."""
    chunks = weights.view(len(weights), -1, _CHUNK)
    if count < chunks.shape[1]:
        best = chunks.amax(dim=-1).topk(count, dim=-1, sorted=False).indices
        weights = chunks.gather(1, best[:, :, None].expand(-1, -1, _CHUNK)).flatten(1)
    return weights.topk(count, dim=-1).values


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Scores are compared and added in float32; float64 stays."""
    return logits.float() if logits.dtype.itemsize < 4 else logits

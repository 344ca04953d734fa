"""From logits to token ids, for completions that each have their own request.

The order is transformers': penalties and the minimum length on the logits, then temperature, top_k, top_p, min_p. A
draw inverts the cumulative distribution at a number from Python's generator, seeded with (seed, completion): the same
on every device, and for a completion alone or beside others.

Legend: R rows (completions), V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alpaca.serving.request import Request

_LEAST_TEMPERATURE = 1e-6  # below it only the most likely token has a chance in float32
_CHUNK = 128  # tokens whose probabilities are added up before the search for the one drawn
_FEW_TOKENS = 1024  # top_p seldom needs more of them, and finding so many is quicker than sorting all
_NEARLY_ONE = 1 - 1e-12


class Choices:
    """What one completion's choices depend on beside its logits: its request, its random numbers, what it chose."""

    def __init__(
        self, request: Request, completion: int, *, vocab_size: int, eos_ids: Sequence[int], device: torch.device
    ) -> None:
        self.request = request
        self.num_chosen = 0
        self.eos_ids = list(eos_ids)
        self._generator = random.Random(f"{request.seed}:{completion}")
        if self.is_penalised:
            self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.in_prompt[list(request.prompt_ids)] = True
            self.counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)

    @property
    def is_penalised(self) -> bool:
        request = self.request
        return bool(request.repetition_penalty != 1 or request.presence_penalty or request.frequency_penalty)

    @property
    def is_greedy(self) -> bool:
        return self.request.temperature == 0

    @property
    def must_go_on(self) -> bool:
        """Whether EOS may not be chosen yet."""
        return self.num_chosen < self.request.min_new_tokens

    def next_uniform(self) -> float:
        """The number in [0, 1) that decides the next choice."""
        return self._generator.random()


def choose(logits: torch.Tensor, rows: Sequence[Choices]) -> torch.Tensor:
    """The next token of each completion: logits [R, V] -> ids [R], counted in `rows`. Does not wait for the device."""
    batch = SamplingBatch.of(rows, logits.device)
    scores = penalise(at_least_float32(logits), rows)
    ids = sample(scores, batch)
    count(rows, ids)
    return ids


# Penalties: for the few completions that ask for them, row by row ---------------------------------------------------


def penalise(scores: torch.Tensor, rows: Sequence[Choices]) -> torch.Tensor:
    """Apply repetition, presence and frequency penalties to the rows that have them. [R, V] -> [R, V]."""
    penalised = [index for index, row in enumerate(rows) if row.is_penalised]
    if penalised:
        scores = scores.clone()
        for index in penalised:
            scores[index] = _penalise_row(scores[index], rows[index])
    return scores


def _penalise_row(scores: torch.Tensor, row: Choices) -> torch.Tensor:
    request, occurred = row.request, row.counts > 0
    if request.repetition_penalty != 1:
        less = torch.where(scores < 0, scores * request.repetition_penalty, scores / request.repetition_penalty)
        scores = torch.where(row.in_prompt | occurred, less, scores)
    return scores - request.presence_penalty * occurred - request.frequency_penalty * row.counts


def count(rows: Sequence[Choices], ids: torch.Tensor) -> None:
    """Note what was chosen."""
    for index, row in enumerate(rows):
        row.num_chosen += 1
        if row.is_penalised:
            row.counts.index_add_(0, ids[index : index + 1], row.counts.new_ones(1))


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
    any_sampled: bool
    any_filtered: bool
    any_must_go_on: bool

    @classmethod
    def of(cls, rows: Sequence[Choices], device: torch.device) -> "SamplingBatch":
        """Draw each row's number and lay the parameters out."""
        columns = SamplingColumns.of(rows)
        tensors = {name: torch.tensor(values, dtype=DTYPES[name], device=device) for name, values in columns.values()}
        eos_ids = torch.tensor(rows[0].eos_ids, dtype=torch.int64, device=device)
        return cls(**tensors, eos_ids=eos_ids, **columns.flags())


DTYPES = {
    "temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32,
    "uniform": torch.float64, "must_go_on": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingColumns:
    """A `SamplingBatch` as lists on the host."""

    temperature: list[float]
    top_k: list[int]
    top_p: list[float]
    min_p: list[float]
    uniform: list[float]
    must_go_on: list[bool]

    @classmethod
    def of(cls, rows: Sequence[Choices]) -> "SamplingColumns":
        requests = [row.request for row in rows]
        return cls(
            temperature=[request.temperature for request in requests],
            top_k=[request.top_k for request in requests],
            top_p=[request.top_p for request in requests],
            min_p=[request.min_p for request in requests],
            uniform=[0.0 if row.is_greedy else row.next_uniform() for row in rows],
            must_go_on=[row.must_go_on for row in rows],
        )

    def values(self) -> list[tuple[str, list]]:
        return [(name, getattr(self, name)) for name in DTYPES]

    def flags(self) -> dict[str, bool]:
        filtered = (
            temperature and (top_k or top_p < 1 or min_p)
            for temperature, top_k, top_p, min_p in zip(
                self.temperature, self.top_k, self.top_p, self.min_p, strict=True
            )
        )
        return {
            "any_sampled": any(self.temperature),
            "any_filtered": any(filtered),
            "any_must_go_on": any(self.must_go_on),
        }


def sample(scores: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Token ids [R] from scores [R, V] (changed in place)."""
    if batch.any_must_go_on:
        banned = torch.where(batch.must_go_on, float("-inf"), 0.0).to(scores.dtype)
        scores.index_add_(1, batch.eos_ids, banned[:, None].expand(-1, len(batch.eos_ids)))
    if not batch.any_sampled:
        return scores.argmax(dim=-1)
    most_likely = scores.max(dim=-1, keepdim=True)
    scores = divide(scores, most_likely.values, batch.temperature)
    drawn = _draw_filtered(scores, batch) if batch.any_filtered else draw(scores, batch.uniform)
    return torch.where(batch.temperature == 0, most_likely.indices[:, 0], drawn)


def divide(scores: torch.Tensor, highest: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Scores over the temperature, shifted so that the highest is 0: the smallest temperature overflows nothing."""
    return (scores - highest) / temperature.clamp(min=_LEAST_TEMPERATURE)[:, None]


def draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token of each row's softmax: the first at which the cumulative probability passes uniform [R]. -> [R].

    The highest score of each row is 0. The search goes over sums of chunks, then inside one.
    """
    rows, size = scores.shape
    weights = torch.nn.functional.pad(scores.exp(), (0, -size % _CHUNK)).view(rows, -1, _CHUNK)
    cumulative = weights.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:] * _NEARLY_ONE
    chunk = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(chunk > 0, cumulative.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = weights.gather(1, chunk[:, :, None].expand(-1, -1, _CHUNK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    # Rounding may put the target past the chunk's end; a token without probability is never reached.
    within = torch.minimum(target - before, inside[:, -1:] * _NEARLY_ONE)
    return (chunk * _CHUNK + torch.searchsorted(inside, within, right=True))[:, 0]


def _draw_filtered(scores: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """As `draw`, for rows of which some drop tokens by top_k, top_p or min_p.

    Rows with top_k or top_p are drawn from their tokens in falling order, the others in the vocabulary's, whatever the
    rows beside them ask for.
    """
    min_p = batch.min_p[:, None]
    in_order = draw(scores.masked_fill(scores.exp() < min_p, float("-inf")), batch.uniform)
    ordered, ids = _falling(scores, batch)
    kept = filtered(ordered, scores.exp().sum(dim=-1, keepdim=True), batch)
    place = draw(kept, batch.uniform)
    by_rank = ids.gather(1, place[:, None])[:, 0]
    return torch.where((batch.top_k > 0) | (batch.top_p < 1), by_rank, in_order)


def filtered(ordered: torch.Tensor, total: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Scores in falling order [R, K], what top_k, top_p and min_p drop at -inf. `total` [R, 1]: sum of all exp(scores).

    top_p keeps the fewest tokens whose probabilities, among those top_k left, reach it; always one.
    """
    weights = ordered.exp()
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    top_k = torch.where(batch.top_k > 0, batch.top_k, torch.iinfo(torch.int64).max)[:, None]
    left = weights.masked_fill(rank >= top_k, 0.0)
    mass = torch.where(batch.top_k[:, None] > 0, left.sum(dim=-1, keepdim=True), total)
    before = left.cumsum(dim=-1) - left
    dropped = (rank >= top_k) | ((before >= batch.top_p[:, None] * mass) & (batch.top_p < 1)[:, None])
    dropped |= weights < batch.min_p[:, None]
    dropped[:, 0] = False
    return ordered.masked_fill(dropped, float("-inf"))


def _falling(scores: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's scores and ids in falling order; on the CPU only as many as the rows can need."""
    if scores.device.type == "cpu":
        needed = _num_needed(scores, batch)
        if needed < scores.shape[1]:
            return torch.topk(scores, needed, dim=-1)
    return torch.sort(scores, dim=-1, descending=True, stable=True)


def _num_needed(scores: torch.Tensor, batch: SamplingBatch) -> int:
    """How many of the highest scores decide every row: top_k of them, or those that hold top_p."""
    most = max(batch.top_k.tolist())
    by_mass = (batch.top_k == 0) & (batch.top_p < 1)
    if not by_mass.any():
        return max(most, 1)
    few = min(max(most, _FEW_TOKENS), scores.shape[1])
    highest = torch.topk(scores[by_mass], few, dim=-1, sorted=False).values.exp().sum(dim=-1)
    enough = highest > batch.top_p[by_mass] * scores[by_mass].exp().sum(dim=-1)
    return few if bool(enough.all()) else scores.shape[1]


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Scores are compared and added in float32; float64 stays."""
    return logits.float() if logits.dtype.itemsize < 4 else logits

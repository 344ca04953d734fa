"""From logits to token ids, for the completions of one request.

The order is transformers': penalties and the minimum length on the logits, then temperature, top_k, top_p, min_p. The
draw inverts the cumulative distribution at a number from Python's generator, seeded with (seed, completion): the same
on every device, and for a completion alone or beside others.
"""

import random
from collections.abc import Sequence

import torch

from alpaca.serving.request import Request

_LEAST_TEMPERATURE = 1e-6  # below it only the most likely token has a chance in float32


class Sampler:
    """Chooses the next token of each completion of one request. Legend: R rows (completions), V vocabulary."""

    def __init__(self, request: Request, *, vocab_size: int, eos_ids: Sequence[int], device: torch.device) -> None:
        self._request = request
        self._eos_ids = list(eos_ids)
        self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._in_prompt[list(request.prompt_ids)] = True
        self._counts = torch.zeros(request.n, vocab_size, dtype=torch.int32, device=device)
        self._generators = [random.Random(f"{request.seed}:{i}") for i in range(request.n)]

    def choose(self, logits: torch.Tensor, rows: Sequence[int], num_generated: int) -> list[int]:
        """Token ids for the completions `rows`, from their logits [R, V], after `num_generated` tokens each."""
        scores = self._penalise(logits.float(), rows)
        if num_generated < self._request.min_new_tokens:
            scores[:, self._eos_ids] = float("-inf")
        if self._request.temperature == 0:
            chosen = scores.argmax(dim=-1)
        else:
            chosen = draw(
                self._filter(divide(scores, self._request.temperature)), [self._generators[i].random() for i in rows]
            )
        ids = chosen.tolist()
        self._counts[list(rows), ids] += 1
        return ids

    def _penalise(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        request, counts = self._request, self._counts[list(rows)]
        if request.repetition_penalty != 1:
            penalised = torch.where(
                scores < 0, scores * request.repetition_penalty, scores / request.repetition_penalty
            )
            scores = torch.where(self._in_prompt | (counts > 0), penalised, scores)
        return scores - request.presence_penalty * (counts > 0) - request.frequency_penalty * counts

    def _filter(self, scores: torch.Tensor) -> torch.Tensor:
        request = self._request
        if 0 < request.top_k < scores.shape[-1]:
            scores = keep_top_k(scores, request.top_k)
        if request.top_p < 1:
            scores = keep_top_p(scores, request.top_p)
        if request.min_p > 0:
            scores = keep_min_p(scores, request.min_p)
        return scores


def divide(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Scores over the temperature, shifted so that the highest is 0: the smallest temperature overflows nothing."""
    return (scores - scores.amax(dim=-1, keepdim=True)) / max(temperature, _LEAST_TEMPERATURE)


def keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Drop all but the k highest scores (and those equal to the lowest kept). [R, V] -> [R, V]."""
    lowest = scores.topk(top_k, dim=-1).values[:, -1:]
    return scores.masked_fill(scores < lowest, float("-inf"))


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest most likely tokens whose probabilities reach top_p; always one. [R, V] -> [R, V]."""
    ordered, order = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = before >= top_p
    dropped[:, 0] = False
    return scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))


def keep_min_p(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    """Drop tokens less likely than min_p times the most likely one. [R, V] -> [R, V]."""
    probabilities = scores.softmax(dim=-1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), float("-inf"))


def draw(scores: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """One token of each row's softmax, where the cumulative probability passes the row's number in [0, 1). [R]."""
    cumulative = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)

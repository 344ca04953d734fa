"""What bench.kernels measures of sampling: greedy, sampled and filtered rows, in the engine's way and a short one."""

from collections.abc import Iterator
from functools import cache, partial

import torch

from alpaca.serving.llama.sampling import SamplingKind, at_least_float32, sample_batch
from alpaca.serving.llama.step import SamplingFields
from bench.kernel_cases import Case, Plan, name_of, random

SAMPLINGS = {"greedy": (0.0, 1.0), "sampled": (0.75, 1.0), "top_p": (0.75, 0.9)}  # temperature, top_p


def sampling_cases(plan: Plan) -> Iterator[Case]:
    """Ours as the decode graphs run it, and what a short script would write."""
    dtype = plan.dtypes[0]
    for kind in SAMPLINGS:
        for n in plan.sampled_rows:
            made = cache(partial(SamplingInputs, plan, n, kind, dtype))
            for way in ("ours", "short"):
                yield Case(
                    operation="sample",
                    way=way,
                    setting={"kind": kind, "dtype": name_of(dtype), "rows": n},
                    make=lambda made=made, way=way: [getattr(made(), way)],
                    error_of=lambda found, made=made, way=way: made().error_of(found, is_ours=way == "ours"),
                    tolerance=5e-3,  # where top_p cuts, equal scores of bfloat16 may fall on either side
                    num_bytes=n * plan.vocab_size * dtype.itemsize,
                    is_chosen=way == "ours",
                )


class SamplingInputs:
    """Logits [R, V] of about a model's spread, and what each row asks for."""

    def __init__(self, plan: Plan, n: int, kind: str, dtype: torch.dtype) -> None:
        self.logits = random(plan, n, plan.vocab_size, dtype=dtype, scale=2.0)
        self.temperature, self.top_p = SAMPLINGS[kind]
        columns = SamplingFields(
            temperature=torch.full((n,), self.temperature), top_k=torch.zeros(n, dtype=torch.int64),
            top_p=torch.full((n,), self.top_p), min_p=torch.zeros(n),
            uniform=torch.rand(n, dtype=torch.float64), must_go_on=torch.zeros(n, dtype=torch.bool),
        )  # fmt: skip
        self.fields = SamplingFields(**{name: values.to(plan.device) for name, values in vars(columns).items()})
        self.eos_ids = torch.tensor([2], device=plan.device)
        self.kind = SamplingKind(
            any_greedy=True, any_sampled=self.temperature > 0, any_filtered=self.top_p < 1, any_must_go_on=True
        )

    def ours(self) -> torch.Tensor:
        return sample_batch(at_least_float32(self.logits).clone(), self.fields, self.eos_ids, self.kind)

    def short(self) -> torch.Tensor:
        scores = self.logits.float()
        if self.temperature == 0:
            return scores.argmax(dim=-1)
        weights = (scores / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            falling, ids = weights.sort(dim=-1, descending=True)
            falling = falling.masked_fill(falling.cumsum(dim=-1) - falling >= self.top_p, 0.0)
            chosen = falling.div_(torch.empty_like(falling).exponential_()).argmax(dim=-1, keepdim=True)
            return ids.gather(1, chosen)[:, 0]
        return weights.div_(torch.empty_like(weights).exponential_()).argmax(dim=-1)

    def error_of(self, found: torch.Tensor, *, is_ours: bool) -> float:
        """How far a row's number lies outside of the share of the probabilities its token stands for."""
        scores = self.logits.double()
        if self.temperature == 0:
            return (scores.amax(dim=-1) - scores.gather(1, found[:, None])[:, 0]).max().item()
        weights = (scores / self.temperature).softmax(dim=-1)
        falling = weights.sort(dim=-1, descending=True).values
        kept = (falling.cumsum(dim=-1) - falling < self.top_p).sum(dim=-1, keepdim=True)
        weights = weights.where(weights >= falling.gather(1, kept - 1), 0.0)
        above = weights.cumsum(dim=-1).gather(1, found[:, None])[:, 0] / weights.sum(dim=-1)
        own = weights.gather(1, found[:, None])[:, 0] / weights.sum(dim=-1)
        if not is_ours:  # draws numbers of its own: its tokens must only be possible ones
            return float((own <= 0).any())
        uniform = self.fields.uniform
        return torch.maximum(uniform - above, above - own - uniform).clamp(min=0).max().item()

"""Log-probabilities of tokens in the model's own distribution: before temperature, penalties and filters.

They are a log-softmax in float32 over the ids that can be sampled: the tokenizer's. Rows that a model has beyond them
never are, and take no part. Few rows are looked at a time, so that a long prompt's logits never stand in memory whole.

Legend: R rows, V vocabulary, K most likely tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from alpaca.serving.engine import TokenScore

ROWS_AT_ONCE = 32  # whose logits are computed, or widened to float32, together


@dataclass(frozen=True)
class Scores:
    """Those of several rows: of their own tokens [R], and the most likely ones' ids and log-probabilities [R, K].

    num_top: how many of the most likely ones each row wants.
    """

    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    num_top: Sequence[int]

    def to_host(self) -> "Scores":
        """Begin to copy them to the host. They may be read once all work queued on the device so far is done."""
        tensors = (_to_host(tensor) for tensor in (self.logprobs, self.top_ids, self.top_logprobs))
        return Scores(*tensors, num_top=self.num_top)

    def read(self) -> list[TokenScore]:
        """The rows' scores, once they are on the host."""
        columns = (self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist(), self.num_top)
        return [
            TokenScore(logprob, tuple(zip(ids[:count], logprobs[:count], strict=True)))
            for logprob, ids, logprobs, count in zip(*columns, strict=True)
        ]


def score_tokens(
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    num_top: Sequence[int],
) -> Scores:
    """Scores of a token of each row: rows and ids [R] int64. The host does not wait for the device.

    logits_of: gives the logits [r, V] of some of the rows. Negative ids, which stand for no token, get any score.
    """
    pairs = zip(rows.split(ROWS_AT_ONCE), token_ids.clamp(min=0).split(ROWS_AT_ONCE), strict=True)
    parts = [_score(logits_of(some), ids, max(num_top)) for some, ids in pairs]
    return Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)), num_top=num_top)


def _score(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, ...]:
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # To find the largest alone takes a fraction of the time.
    best = (
        logprobs.max(dim=-1, keepdim=True) if num_top == 1 else logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    )
    return logprobs.gather(1, token_ids[:, None])[:, 0], best.indices, best.values


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)

"""Which examples an optimizer step takes, how they are split over processes, and how a micro-batch is laid out.

All of this follows from the number of examples, the seed, the step and the number of processes. So each process knows
the parts of all others without asking, and a resumed run continues where it stopped.
"""

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca.data.examples import MASKED_LABEL

_DUMMY_TOKENS = 2  # one position that predicts another, so that the loss has a graph


@functools.lru_cache(maxsize=2)
def epoch_permutation(num_examples: int, *, seed: int, epoch: int) -> Tensor:
    """The order of the examples in one epoch: int64 [num_examples], the same on any number of processes."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)  # seed + epoch would repeat the next seed's orders
    return torch.randperm(num_examples, generator=generator)


def count_steps_per_epoch(num_examples: int, *, global_batch_size: int) -> int:
    """Count the whole batches of an epoch; the rest is dropped, but a set smaller than one batch makes one step."""
    return max(1, num_examples // global_batch_size)


def step_examples(num_examples: int, *, global_batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the examples of one optimizer step (counted from 0): int64 [B]."""
    steps_per_epoch = count_steps_per_epoch(num_examples, global_batch_size=global_batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    order = epoch_permutation(num_examples, seed=seed, epoch=epoch)
    return order[position * global_batch_size : (position + 1) * global_batch_size]


def split_step(indices: Tensor, *, rank: int, num_processes: int, micro_batch_size: int) -> list[Tensor]:
    """One process's micro-batches of a step: micro step a takes `indices[(a * num_processes + rank) * size :][:size]`.

    All processes get the same number of micro-batches, since their collectives must match; where there are not enough
    examples, a micro-batch is empty.
    """
    slices = indices.split(micro_batch_size)
    num_micro_steps = -(-len(slices) // num_processes)
    own = list(slices[rank::num_processes])
    return own + [indices[:0]] * (num_micro_steps - len(own))


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Right-padded examples: ids, labels (-100 carries no loss; not shifted) and attention mask, all int64 [B, T]."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            attention_mask=self.attention_mask.to(device),
        )


def split_step_by_tokens(
    indices: Tensor, lengths: Tensor, *, rank: int, num_processes: int, max_tokens: int
) -> list[Tensor]:
    """One process's micro-batches of a step, of about equally many tokens and at most `max_tokens` each.

    Examples are placed from the longest to the shortest, each into the micro-batch with the fewest tokens so far. There
    are as few micro-batches as suffice, equally many for each process. An example longer than `max_tokens` gets one of
    its own.
    """
    order = indices[lengths[indices].argsort(descending=True, stable=True)].tolist()
    sizes = {index: int(lengths[index]) for index in order}
    num_micro_steps = max(1, -(-sum(sizes.values()) // (max_tokens * num_processes)))
    while True:
        groups = _balance(order, sizes, num_micro_steps * num_processes)
        if all(len(group) <= 1 or sum(map(sizes.__getitem__, group)) <= max_tokens for group in groups):
            return [torch.tensor(sorted(group), dtype=torch.int64) for group in groups[rank::num_processes]]
        num_micro_steps += 1


def _balance(order: list[int], sizes: dict[int, int], num_groups: int) -> list[list[int]]:
    """Put each example into the group with the fewest tokens so far; of equal groups, into the first."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    heap = [(0, number) for number in range(num_groups)]
    for index in order:
        weight, number = heapq.heappop(heap)
        groups[number].append(index)
        heapq.heappush(heap, (weight + sizes[index], number))
    return groups


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """Examples laid end to end, N tokens in all, of which R positions are followed by a target token."""

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64: restart at each example
    target_positions: Tensor  # [R] int64, in [0, N)
    target_ids: Tensor  # [R] int64: the token that follows each position
    lengths: list[int]

    def to(self, device: torch.device) -> "PackedBatch":
        moved = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "position_ids", "target_positions", "target_ids")
        }
        return PackedBatch(**moved, lengths=self.lengths)


def pack(examples: Sequence[tuple[Tensor, Tensor]], *, pad_id: int) -> PackedBatch:
    """Lay (ids, labels) pairs end to end. Without examples the result is a dummy whose only target carries no loss."""
    if not examples:
        dummy = torch.full((_DUMMY_TOKENS,), pad_id)
        examples = [(dummy, torch.full_like(dummy, MASKED_LABEL))]
    labels = torch.cat([torch.cat([own[1:], own.new_tensor([MASKED_LABEL])]) for _, own in examples])
    positions = (labels != MASKED_LABEL).nonzero()[:, 0]
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.int64)
    return PackedBatch(
        input_ids=torch.cat([ids for ids, _ in examples]),
        position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in examples]),
        target_positions=positions,
        target_ids=labels[positions],
        lengths=[len(ids) for ids, _ in examples],
    )


def collate(examples: Sequence[tuple[Tensor, Tensor]], *, pad_id: int) -> MicroBatch:
    """Pad (ids, labels) pairs on the right to the longest. Without examples the result is a dummy that carries no loss.

    The mask comes from the lengths, not from the ids: where pad and EOS are one id, EOS is still attended to.
    """
    if not examples:
        return _dummy(pad_id)
    ids, labels = ([pair[part] for pair in examples] for part in (0, 1))
    return MicroBatch(
        input_ids=_pad(ids, pad_id),
        labels=_pad(labels, MASKED_LABEL),
        attention_mask=_pad([torch.ones_like(row) for row in ids], 0),
    )


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _dummy(pad_id: int) -> MicroBatch:
    row = torch.full((1, _DUMMY_TOKENS), pad_id)
    return MicroBatch(input_ids=row, labels=torch.full_like(row, MASKED_LABEL), attention_mask=torch.ones_like(row))

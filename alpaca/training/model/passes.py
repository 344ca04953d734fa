"""Forward passes over sequences, laid end to end or padded: cross entropies of their target tokens."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alpaca.data.batching import MicroBatch, collate, pack, split_step, split_step_by_tokens
from alpaca.data.examples import MASKED_LABEL
from alpaca.training.distributed import World
from alpaca.training.model import padding_free

Labelled = tuple[Tensor, Tensor]  # a sequence's ids and labels, both int64 [T]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How a run's model is given sequences.

    bf16: whether by autocast.    micro_batch_size: examples of a padded micro-batch; without padding a micro-batch has
    as many tokens as so many of them have at `max_length`.
    """

    model: nn.Module
    pad_id: int
    bf16: bool
    micro_batch_size: int
    max_length: int
    world: World

    def split(self, indices: Tensor, lengths: Tensor, *, width: int = 1) -> list[Tensor]:
        """Cut this process's part of some examples into micro-batches, each a tensor of their numbers.

        lengths: tokens of every example, of all its `width` sequences. All processes get equally many micro-batches.
        """
        layout = {"rank": self.world.rank, "num_processes": self.world.num_processes}
        if not padding_free.is_enabled(self.model):
            return split_step(indices, micro_batch_size=self.micro_batch_size, **layout)
        max_tokens = self.micro_batch_size * self.max_length * width
        return split_step_by_tokens(indices, lengths, max_tokens=max_tokens, **layout)

    def sum_losses(self, examples: Sequence[Labelled], *, smoothing: float = 0.0) -> Tensor:
        """The summed cross entropy (float32 scalar) of the target tokens, differentiable.

        smoothing: the share of each target's weight that is spread over the whole vocabulary.
        """
        if padding_free.is_enabled(self.model):
            batch = pack(examples, pad_id=self.pad_id).to(self.world.device)
            return padding_free.sum_packed_losses(self.model, batch, bf16=self.bf16, smoothing=smoothing)
        return self._padded_losses(examples, reduction="sum", smoothing=smoothing)[0]

    def target_losses(self, examples: Sequence[Labelled]) -> Tensor:
        """The cross entropies (float32 [R], sequence after sequence) of the target tokens, differentiable.

        Without examples it is a single zero, so that it has a graph.
        """
        if padding_free.is_enabled(self.model):
            batch = pack(examples, pad_id=self.pad_id).to(self.world.device)
            return padding_free.packed_losses(self.model, batch, bf16=self.bf16)
        losses, batch = self._padded_losses(examples, reduction="none")
        is_target = (batch.labels[:, 1:] != MASKED_LABEL).flatten()
        return losses[is_target] if examples else losses[:1]

    def _padded_losses(
        self, examples: Sequence[Labelled], *, reduction: str, smoothing: float = 0.0
    ) -> tuple[Tensor, MicroBatch]:
        batch = collate(examples, pad_id=self.pad_id).to(self.world.device)
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            batch.labels[:, 1:].flatten(),
            ignore_index=MASKED_LABEL,
            reduction=reduction,
            label_smoothing=smoothing,
        )
        return losses, batch

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Without gradients and dropout; random numbers stay undrawn."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

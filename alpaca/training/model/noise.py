"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of a training batch, never in evaluation.

Each number of an example's embeddings [T, D] gets one from [-a, a), a = alpha / sqrt(T * D). T is the example's own
length, as in the paper and its authors' code. transformers' Trainer takes the padded length of the whole batch for all
of its examples, which is the same for an example alone. The numbers of an example depend on the seed, the step and the
example, so they are the same in any layout of micro-batches and processes, and after a resume.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds noise to what a model's input embedding gives, while `drawn_for` says for which examples."""

    def __init__(self, model: nn.Module, alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._drawn: list[tuple[int, int]] = []  # a seed and a length for each example
        model.get_input_embeddings().register_forward_hook(self._add)

    @contextlib.contextmanager
    def drawn_for(self, step: int, examples: Sequence[int], lengths: Sequence[int]) -> Iterator[None]:
        """Add the noise of these examples in a forward pass, whose rows or packed row they are in this order."""
        self._drawn = [
            (example_seed(self._seed, step, example), length) for example, length in zip(examples, lengths, strict=True)
        ]
        try:
            yield
        finally:
            self._drawn = []

    def _add(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """output: [1, N, D], packed, or [B, T, D], padded on the right."""
        if not self._drawn:
            return output
        parts = [draw_noise(seed, length, output, self._alpha) for seed, length in self._drawn]
        if len(output) == 1 and sum(length for _, length in self._drawn) == output.shape[1]:
            return output + torch.cat(parts)[None]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return output + nn.functional.pad(padded, (0, 0, 0, output.shape[1] - padded.shape[1]))


def draw_noise(seed: int, length: int, like: Tensor, alpha: float) -> Tensor:
    """The noise [T, D] of an example of `length` tokens, in the dtype and on the device of embeddings [..., D]."""
    width = like.shape[-1]
    generator = torch.Generator(like.device).manual_seed(seed)
    most = alpha / math.sqrt(length * width)
    return torch.empty(length, width, dtype=like.dtype, device=like.device).uniform_(-most, most, generator=generator)


def example_seed(seed: int, step: int, example: int) -> int:
    """The seed of an example's noise in a step (counted from 0)."""
    digest = hashlib.blake2b(f"noise {seed} {step} {example}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")

"""Instruction examples: split and encoded as the original recipe encodes them.

Ids and labels equal Stanford's train.py token for token. Prompt and answer are tokenized as one text, EOS is added by
id, the right is cut to `max_length`, and as many leading labels are masked as the prompt alone has tokens. (So where
the tokenizer merges the prompt's last colon with the answer's first character, that character carries no loss: 3 % of
the Alpaca data. This is the recipe; it is kept.) The original cuts examples without saying so; here they are counted,
and examples that could teach nothing, because every label is masked, are dropped.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from alpaca.data.records import Example
from alpaca.errors import InputError
from alpaca.text.prompts import alpaca_prompt
from alpaca.text.tokenizer import Tokenizer

MASKED_LABEL = -100  # the label that torch's cross entropy ignores
_CHUNK = 1024  # examples encoded at once: enough to keep every core busy, few enough to keep the progress bar moving

# Splitting ----------------------------------------------------------------------------------------------------


def split_examples(examples: Sequence[Example], *, num_held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Split examples into (those to train on, those held out), each in their original order.

    The choice depends only on the seed and the number of examples. With the same seed a larger `num_held_out` holds out
    the same examples and more. Raises InputError when nothing would be
    left to train on.
    """
    if not 0 <= num_held_out < len(examples):
        raise InputError(
            f"cannot hold out {num_held_out:,} of {len(examples):,} examples; "
            f"expected a number from 0 to {len(examples) - 1:,}"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:num_held_out])
    train = [example for index, example in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


# Encoding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodingReport:
    """Counts of an encoding. Those below `num_kept` count kept examples only; the last two count tokens."""

    max_length: int  # tokens
    num_read: int
    num_all_masked: int  # dropped: no label is left that carries loss
    num_kept: int
    num_empty_outputs: int  # only white space: they teach the model to answer nothing
    num_duplicates: int  # copies of an earlier example: instruction, input and output are equal
    num_without_eos: int  # cut, so that their EOS is lost
    num_tokens: int
    num_targets: int  # tokens that carry loss

    def lines(self) -> list[str]:
        """The report for a log: totals first, then a line for each thing that occurs."""
        totals = f"{self.num_kept:,} of {self.num_read:,} examples: {self.num_tokens:,} tokens"
        findings = {
            f"dropped: their prompt fills all {self.max_length} tokens, nothing is left to learn": self.num_all_masked,
            f"longer than {self.max_length} tokens: cut, and without their EOS": self.num_without_eos,
            "with an empty output: they teach to answer nothing": self.num_empty_outputs,
            "exact copies of an earlier one": self.num_duplicates,
        }
        return [
            f"{totals}, {self.num_targets:,} of them carry loss",
            *(f"{count:,} {text}" for text, count in findings.items() if count),
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedDataset:
    """Encoded examples, laid end to end in flat tensors: E examples that have N tokens in all.

    ids: int32 [N].   offsets: int64 [E + 1], where each example starts and the last one ends.
    prompt_lengths: int64 [E], the number of leading labels that are masked.
    report: the counts of the encoding; a subset keeps the report of the whole set.
    """

    ids: Tensor
    offsets: Tensor
    prompt_lengths: Tensor
    report: EncodingReport

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each example: int64 [E]."""
        return self.offsets.diff()

    @cached_property
    def target_counts(self) -> Tensor:
        """Labels of each example that carry loss: int64 [E]. The first token is never predicted, masked or not."""
        return _count_targets(self.lengths, self.prompt_lengths)

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of one example, both int64 [T]; labels are not shifted."""
        index = range(len(self))[index]  # an IndexError, where a slice would be empty
        ids = self.ids[self.offsets[index] : self.offsets[index + 1]].long()
        labels = ids.clone()
        labels[: self.prompt_lengths[index]] = MASKED_LABEL
        return ids, labels

    def subset(self, indices: Sequence[int] | Tensor) -> "EncodedDataset":
        """The examples at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        starts, ends = self.offsets[:-1][chosen].tolist(), self.offsets[1:][chosen].tolist()
        return EncodedDataset(
            ids=torch.cat([self.ids[:0], *(self.ids[start:end] for start, end in zip(starts, ends, strict=True))]),
            offsets=_offsets(self.lengths[chosen]),
            prompt_lengths=self.prompt_lengths[chosen],
            report=self.report,
        )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int = 512,
    train_on_inputs: bool = False,
    progress: bool = True,
) -> EncodedDataset:
    """Encode examples as the original recipe does, and keep those that have a label to learn from.

    max_length: the tokens that an example is cut to, on the right. train_on_inputs: no label is masked, so that prompts
    carry loss too, as in alpaca-lora. progress: show a bar on a terminal when it takes over a second.
    Raises InputError when there were examples and none is left.
    """
    parts = []
    with tqdm(total=len(examples), desc="encode", unit=" examples", delay=1, disable=None if progress else True) as bar:
        for start in range(0, max(len(examples), 1), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            parts.append(_encode_chunk(chunk, tokenizer, max_length=max_length, mask_prompts=not train_on_inputs))
            bar.update(len(chunk))
    names = [field.name for field in dataclasses.fields(_Encoded)]
    whole = _Encoded(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    report = _make_report(examples, whole, max_length=max_length)
    if report.num_read and not report.num_kept:
        raise InputError(
            f"none of the {report.num_read:,} examples has a token to learn from: every prompt fills the "
            f"{max_length} tokens an example is cut to; raise --model_max_length"
        )
    lengths = whole.full_lengths[whole.kept].clamp(max=max_length)
    return EncodedDataset(
        ids=whole.ids, offsets=_offsets(lengths), prompt_lengths=whole.prompt_lengths[whole.kept], report=report
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """E encoded examples: the ids of the kept ones, laid end to end, and the lengths of all."""

    ids: Tensor  # int32 [N]
    full_lengths: Tensor  # int64 [E], before the cut
    prompt_lengths: Tensor  # int64 [E], at most the length after the cut
    kept: Tensor  # bool [E]


def _encode_chunk(
    examples: Sequence[Example], tokenizer: Tokenizer, *, max_length: int, mask_prompts: bool
) -> _Encoded:
    prompts = [alpaca_prompt(example.instruction, example.input) for example in examples]
    texts = [prompt + example.output for prompt, example in zip(prompts, examples, strict=True)]
    encoded = tokenizer.encode_batch(prompts + texts)
    rows = [[*tokenizer.prefix_ids, *row, tokenizer.eos_id] for row in encoded[len(prompts) :]]
    full_lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    lengths = full_lengths.clamp(max=max_length)
    prompt_lengths = torch.tensor([len(row) for row in encoded[: len(prompts)]], dtype=torch.int64)
    prompt_lengths = torch.minimum(prompt_lengths + len(tokenizer.prefix_ids), lengths) * mask_prompts
    kept = _count_targets(lengths, prompt_lengths) > 0
    cut_rows = (row[:max_length] for row, keep in zip(rows, kept.tolist(), strict=True) if keep)
    ids = torch.tensor(list(chain.from_iterable(cut_rows)), dtype=torch.int32)
    return _Encoded(ids=ids, full_lengths=full_lengths, prompt_lengths=prompt_lengths, kept=kept)


def _make_report(examples: Sequence[Example], encoded: _Encoded, *, max_length: int) -> EncodingReport:
    kept = [example for example, keep in zip(examples, encoded.kept.tolist(), strict=True) if keep]
    full_lengths = encoded.full_lengths[encoded.kept]
    targets = _count_targets(full_lengths.clamp(max=max_length), encoded.prompt_lengths[encoded.kept])
    return EncodingReport(
        max_length=max_length,
        num_read=len(examples),
        num_all_masked=len(examples) - len(kept),
        num_kept=len(kept),
        num_empty_outputs=sum(not example.output.strip() for example in kept),
        num_duplicates=len(kept) - len(set(kept)),
        num_without_eos=int((full_lengths > max_length).sum()),
        num_tokens=len(encoded.ids),
        num_targets=int(targets.sum()),
    )


def _count_targets(lengths: Tensor, prompt_lengths: Tensor) -> Tensor:
    return lengths - prompt_lengths.clamp(min=1)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

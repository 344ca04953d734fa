"""Examples: split, and encoded by a layout.

With the Alpaca prompt ids and labels equal Stanford's train.py token for token. The right is cut to `max_length`. The
original cuts examples without saying so; here they are counted, and examples that could teach nothing, because every
label is masked, are dropped.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from alpaca.data.encoding.layout import Layout, Row
from alpaca.data.example import AnyExample
from alpaca.errors import InputError

MASKED_LABEL = -100  # the label that torch's cross entropy ignores
_CHUNK = 1024  # examples encoded at once: enough to keep every core busy, few enough to keep the progress bar moving

# Splitting ----------------------------------------------------------------------------------------------------


def split_examples(
    examples: Sequence[AnyExample], *, num_held_out: int, seed: int
) -> tuple[list[AnyExample], list[AnyExample]]:
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
    num_merged: int  # a token holds the prompt's end and the answer's beginning
    num_asked_otherwise: int  # a server's prompt for one of the answers is not what stands before it
    num_tokens: int
    num_targets: int  # tokens that carry loss
    counted: str = "examples"  # what the counts are of

    def lines(self) -> list[str]:
        """The report for a log: totals first, then a line for each thing that occurs."""
        totals = f"{self.num_kept:,} of {self.num_read:,} {self.counted}: {self.num_tokens:,} tokens"
        findings = {
            f"dropped: their prompt fills all {self.max_length} tokens, nothing is left to learn": self.num_all_masked,
            f"longer than {self.max_length} tokens: cut, and without their EOS": self.num_without_eos,
            "with an empty output: they teach to answer nothing": self.num_empty_outputs,
            "exact copies of an earlier one": self.num_duplicates,
            "whose answer begins inside the prompt's last token, which carries no loss (--prompt_boundary split)": (
                self.num_merged
            ),
            "whose chat template asks for an answer by another prompt than it writes before it here": (
                self.num_asked_otherwise
            ),
        }
        return [
            f"{totals}, {self.num_targets:,} of them carry loss",
            *(f"{count:,} {text}" for text, count in findings.items() if count),
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedDataset:
    """Encoded examples, laid end to end in flat tensors: E examples that have N tokens in all.

    ids: int32 [N].   offsets: int64 [E + 1], where each example starts and the last one ends.
    trained: bool [N], the labels that carry loss.
    report: the counts of the encoding; a subset keeps the report of the whole set.
    width: the sequences that one example of a run has, here and in `PreferenceDataset`.
    """

    ids: Tensor
    offsets: Tensor
    trained: Tensor
    report: EncodingReport
    width: ClassVar[int] = 1

    @property
    def sequences(self) -> "EncodedDataset":
        """All of its sequences."""
        return self

    def places(self, indices: Tensor) -> Tensor:
        """Where the sequences of examples are: int64 [width * B]."""
        return indices

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each example: int64 [E]."""
        return self.offsets.diff()

    @cached_property
    def target_counts(self) -> Tensor:
        """Labels of each example that carry loss: int64 [E]. The first token is never predicted, masked or not."""
        before = torch.cat([self.offsets.new_zeros(1), self.trained.cumsum(0)])
        starts, ends = self.offsets[:-1], self.offsets[1:]
        return before[ends] - before[torch.minimum(starts + 1, ends)]

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """Tokens of each example before the first that carries loss: int64 [E]; all, where none does."""
        places = self.trained.nonzero().flatten()
        first = torch.searchsorted(places, self.offsets[:-1])
        ends = self.offsets[1:]
        found = torch.cat([places, places.new_full((1,), len(self.trained))])[first]
        return torch.minimum(found, ends) - self.offsets[:-1]

    @property
    def trains_ends_alone(self) -> bool:
        """Whether all tokens of an example behind its first that carries loss do so, too."""
        return int(self.trained.sum()) == int((self.lengths - self.prompt_lengths).sum())

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of one example, both int64 [T]; labels are not shifted."""
        index = range(len(self))[index]  # an IndexError, where a slice would be empty
        place = slice(self.offsets[index], self.offsets[index + 1])
        ids = self.ids[place].long()
        return ids, ids.masked_fill(~self.trained[place], MASKED_LABEL)

    def subset(self, indices: Sequence[int] | Tensor) -> "EncodedDataset":
        """The examples at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        starts, ends = self.offsets[:-1][chosen].tolist(), self.offsets[1:][chosen].tolist()
        places = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        return EncodedDataset(
            ids=torch.cat([self.ids[:0], *(self.ids[place] for place in places)]),
            offsets=_offsets(self.lengths[chosen]),
            trained=torch.cat([self.trained[:0], *(self.trained[place] for place in places)]),
            report=self.report,
        )


def encode_examples(
    examples: Sequence[AnyExample],
    layout: Layout,
    *,
    max_length: int = 512,
    train_on_inputs: bool = False,
    progress: bool = True,
) -> EncodedDataset:
    """`encode_groups` of single examples."""
    options = {"max_length": max_length, "train_on_inputs": train_on_inputs, "progress": progress}
    return encode_groups(examples, layout, width=1, counted="examples", **options)[0]


def encode_groups(
    examples: Sequence[AnyExample],
    layout: Layout,
    *,
    width: int,
    counted: str,
    max_length: int,
    train_on_inputs: bool,
    progress: bool,
) -> tuple[EncodedDataset, Tensor]:
    """Encode examples by a layout, and keep those that have a label to learn from. Returns also which were kept, bool.

    width: of so many in a row all are kept or none. counted: what the report calls them. max_length: the tokens that an
    example is cut to, on the right. train_on_inputs: no label is masked, so that prompts carry loss too, as in
    alpaca-lora. progress: show a bar on a terminal when it takes over a second.
    Raises InputError when there were examples and none is left.
    """
    parts = []
    with tqdm(total=len(examples), desc="encode", unit=" examples", delay=1, disable=None if progress else True) as bar:
        for start in range(0, max(len(examples), 1), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            rows = layout.encode(chunk)
            parts.append(_pack(rows, max_length=max_length, mask_prompts=not train_on_inputs, width=width))
            bar.update(len(chunk))
    names = [field.name for field in dataclasses.fields(_Encoded)]
    whole = _Encoded(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    offsets = _offsets(whole.full_lengths[whole.kept].clamp(max=max_length))
    report = _make_report(examples, whole, max_length=max_length, counted=counted)
    if report.num_read and not report.num_kept:
        raise InputError(
            f"none of the {report.num_read:,} {counted} has a token to learn from: every prompt fills the "
            f"{max_length} tokens an example is cut to; raise --model_max_length"
        )
    return EncodedDataset(ids=whole.ids, offsets=offsets, trained=whole.trained, report=report), whole.kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """E encoded examples: the ids of the kept ones, laid end to end, and the lengths of all."""

    ids: Tensor  # int32 [N]
    trained: Tensor  # bool [N]
    full_lengths: Tensor  # int64 [E], before the cut
    merged: Tensor  # bool [E]
    asked_otherwise: Tensor  # bool [E]
    num_targets: Tensor  # int64 [E]
    kept: Tensor  # bool [E]


def _pack(rows: Sequence[Row], *, max_length: int, mask_prompts: bool, width: int) -> _Encoded:
    ids: list[int] = []
    trained: list[bool] = []
    num_targets: list[int] = []
    kept: list[bool] = []
    for first in range(0, len(rows), width):
        group = [row.ids[:max_length] for row in rows[first : first + width]]
        labels = [
            _labels(len(own), row.spans) if mask_prompts else [True] * len(own)
            for own, row in zip(group, rows[first : first + width], strict=True)
        ]
        counts = [sum(own[1:]) for own in labels]
        num_targets += counts
        kept += [all(counts)] * len(group)
        for own, own_labels in zip(group, labels, strict=True) if all(counts) else ():
            ids += own
            trained += own_labels
    return _Encoded(
        ids=torch.tensor(ids, dtype=torch.int32),
        trained=torch.tensor(trained, dtype=torch.bool),
        full_lengths=torch.tensor([len(row.ids) for row in rows], dtype=torch.int64),
        merged=torch.tensor([row.is_merged for row in rows], dtype=torch.bool),
        asked_otherwise=torch.tensor([row.is_asked_otherwise for row in rows], dtype=torch.bool),
        num_targets=torch.tensor(num_targets, dtype=torch.int64),
        kept=torch.tensor(kept, dtype=torch.bool),
    )


def _labels(length: int, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which of `length` labels carry loss."""
    labels: list[bool] = []
    for start, end in spans:
        start, end = min(start, length), min(end, length)
        labels += [False] * (start - len(labels)) + [True] * (end - start)
    return labels + [False] * (length - len(labels))


def _make_report(examples: Sequence[AnyExample], encoded: _Encoded, *, max_length: int, counted: str) -> EncodingReport:
    kept = [example for example, keep in zip(examples, encoded.kept.tolist(), strict=True) if keep]
    return EncodingReport(
        max_length=max_length,
        num_read=len(examples),
        num_all_masked=len(examples) - len(kept),
        num_kept=len(kept),
        num_empty_outputs=sum(not example.output.strip() for example in kept),
        num_duplicates=len(kept) - len(set(kept)),
        num_without_eos=int((encoded.full_lengths[encoded.kept] > max_length).sum()),
        num_merged=int(encoded.merged[encoded.kept].sum()),
        num_asked_otherwise=int(encoded.asked_otherwise[encoded.kept].sum()),
        num_tokens=len(encoded.ids),
        num_targets=int(encoded.num_targets[encoded.kept].sum()),
        counted=counted,
    )


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

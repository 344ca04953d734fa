"""Data that compares answers, for the objectives that learn from it: arranged, encoded, and paired with other answers.

DPO and ORPO take pairs; KTO takes single answers that are good or not, and measures how far the model has moved by
prompts with the answers of other examples.
"""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alpaca.data.encoding.layout import Layout
from alpaca.data.example import AnyExample, Judged, Pair
from alpaca.data.examples import EncodedDataset, EncodingReport, encode_examples, encode_groups
from alpaca.data.records import one_answer_expected
from alpaca.data.sources.formats import RecordReader
from alpaca.errors import BadExamples

logger = logging.getLogger(__name__)
SFT, DPO, ORPO, KTO = ("sft", "dpo", "orpo", "kto")
PAIRED = (DPO, ORPO)
_UNCUT = 1 << 40  # tokens
AnyUnit = AnyExample | Pair | Judged


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceDataset:
    """E encoded examples. Of pair i, `sequences` has the chosen answer at 2 i and the rejected one behind it.

    learns_prompts: whether the chosen sequences' prompts carry loss, too (ORPO's cross entropy).
    is_good: of single answers, bool [E].    uncut: of these, the sequences before the cut, until `mismatch` has
    made `others` of them: E sequences, each example's prompt with the answer of another.
    """

    sequences: EncodedDataset
    learns_prompts: bool = False
    is_good: Tensor | None = None
    uncut: EncodedDataset | None = None
    others: EncodedDataset | None = None

    @property
    def width(self) -> int:
        """The sequences of an example."""
        return 2 if self.is_good is None else 1

    def __len__(self) -> int:
        return len(self.sequences) // self.width

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each example, of both answers: int64 [E]."""
        return self.sequences.lengths.view(-1, self.width).sum(dim=1)

    @cached_property
    def target_counts(self) -> Tensor:
        """Labels of each example that carry loss: int64 [E]."""
        counts = self.sequences.target_counts.view(-1, self.width)
        if self.learns_prompts:
            counts = torch.stack([self.sequences.lengths[::2] - 1, counts[:, 1]], dim=1)
        return counts.sum(dim=1)

    @property
    def report(self) -> EncodingReport:
        """The counts of the encoding, of answers."""
        return self.sequences.report

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of an example's (chosen) answer with its prompt, both int64 [T]."""
        return self.sequences.example(index * self.width)

    def places(self, indices: Tensor) -> Tensor:
        """Where the sequences of examples are: int64 [width * B]."""
        return (indices[:, None] * self.width + torch.arange(self.width)).flatten()


TrainingData = EncodedDataset | PreferenceDataset


def arrange(examples: Sequence[AnyUnit], reader: RecordReader, *, objective: str, path: str) -> Sequence[AnyUnit]:
    """The examples of a data set as an objective takes them; pairs are taken apart for KTO. Raises BadExamples."""
    judges = reader.format.judges
    if objective == SFT:
        if judges:
            raise BadExamples(f"{path}: {one_answer_expected(reader)}")
        return examples
    found = f"found {reader.format.title} ({reader.format.expected})"
    if not judges:
        need = "chosen and rejected answers" if objective in PAIRED else "labelled answers, or chosen and rejected ones"
        raise BadExamples(
            f"{path}: --objective {objective} needs {need}, {found}; leave --objective out to train on the answers as "
            "they are, or add what is missing"
        )
    if objective in PAIRED and judges != "pairs":
        raise BadExamples(
            f"{path}: --objective {objective} needs two answers to each prompt, chosen and rejected, {found}; "
            "--objective kto takes single ones"
        )
    if objective == KTO and judges == "pairs":
        logger.info("%s: each pair is taken apart into a good answer and a bad one", path)
        return [one for pair in examples for one in (Judged(pair.chosen, True), Judged(pair.rejected, False))]
    return examples


def answers_of(units: Iterable[AnyUnit]) -> list[AnyExample]:
    """All answers, each with its prompt, in order."""
    found: list[AnyExample] = []
    for unit in units:
        if isinstance(unit, Pair):
            found += [unit.chosen, unit.rejected]
        else:
            found.append(unit.answer if isinstance(unit, Judged) else unit)
    return found


def encode_units(
    units: Sequence[AnyUnit], layout: Layout, *, objective: str, train_on_inputs: bool, **options: Any
) -> TrainingData:
    """Encode the examples of a run as `encode_examples` does. Of answers that are compared the prompts stay masked."""
    if objective == SFT:
        return encode_examples(units, layout, train_on_inputs=train_on_inputs, **options)
    width, counted = (2, "answers of pairs") if objective in PAIRED else (1, "labelled answers")
    answers, options = answers_of(units), {**options, "train_on_inputs": False, "width": width, "counted": counted}
    sequences, kept = encode_groups(answers, layout, **options)
    if width == 2:
        return PreferenceDataset(sequences=sequences, learns_prompts=train_on_inputs)
    uncut, learnable = encode_groups(answers, layout, **{**options, "max_length": _UNCUT})
    is_good = torch.tensor([unit.is_good for unit in units])[kept]
    return PreferenceDataset(sequences=sequences, is_good=is_good, uncut=uncut.subset(kept[learnable].nonzero()[:, 0]))


def mismatch(data: PreferenceDataset, order: Tensor, *, batch_size: int, max_length: int) -> PreferenceDataset:
    """Give each example's prompt the answer of the one before it in its batch of `order`: the first, the last one's.

    An example that is alone in its batch gets the answer of the one before it in the order.
    """
    before = order.roll(1)
    for start in range(0, len(order), batch_size):
        if len(own := order[start : start + batch_size]) > 1:
            before[start] = own[-1]
    partners = torch.empty_like(order)
    partners[order] = before
    assert data.uncut is not None
    return dataclasses.replace(data, uncut=None, others=_with_answers_of(data.uncut, partners, max_length))


def _with_answers_of(sequences: EncodedDataset, partners: Tensor, max_length: int) -> EncodedDataset:
    ids, trained, lengths = [], [], []
    prompts = sequences.prompt_lengths.tolist()
    starts, ends = sequences.offsets[:-1].tolist(), sequences.offsets[1:].tolist()
    for index, partner in enumerate(partners.tolist()):
        prompt = slice(starts[index], starts[index] + prompts[index])
        answer = slice(starts[partner] + prompts[partner], ends[partner])
        ids.append(torch.cat([sequences.ids[prompt], sequences.ids[answer]])[:max_length])
        trained.append(torch.cat([sequences.trained[prompt], sequences.trained[answer]])[:max_length])
        lengths.append(len(ids[-1]))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return EncodedDataset(ids=torch.cat(ids), trained=torch.cat(trained), offsets=offsets, report=sequences.report)

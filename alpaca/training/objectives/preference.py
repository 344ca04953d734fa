"""Preference objectives: a step's loss by micro-batches, from two answers to each prompt or from good and bad ones.

Losses are means over the examples of the whole step, as TRL's are of a batch; ORPO adds the mean cross entropy of the
step's chosen tokens. So neither the number of processes nor the cut into micro-batches changes them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca.data.examples import MASKED_LABEL, EncodedDataset
from alpaca.data.preferences import DPO, KTO, ORPO, PreferenceDataset
from alpaca.training.configuration.settings import ObjectiveSettings
from alpaca.training.model.passes import Passes
from alpaca.training.objectives.losses import Measured, dpo_losses, kto_losses, orpo_losses

_PAIRS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
MEASURES: dict[str, tuple[str, ...]] = {  # what is logged of a step, by TRL's names
    DPO: _PAIRS,
    ORPO: (*_PAIRS, "nll_loss", "log_odds_ratio", "log_odds_chosen"),
    KTO: ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"),
}
Share = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of a micro-batch: its share of the step's loss, which is their sum, and sums and counts [2, M] of measures."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step's loss is made of.

    indices: the step's examples, of all processes.    reference: log-probabilities of the model before its first step,
    of all `data.sequences` and, as "others", of all `data.others`.
    """

    passes: Passes
    settings: ObjectiveSettings
    data: PreferenceDataset
    indices: Tensor
    reference: Mapping[str, Tensor]

    def begin(self) -> Share:
        """The function that gives micro-batches their shares. All processes call it together."""
        make = {DPO: self._dpo, ORPO: self._orpo, KTO: self._kto}[self.settings.name]()
        names = MEASURES[self.settings.name]

        def share(micro_batch: Tensor) -> tuple[Tensor, Tensor]:
            if not len(micro_batch):
                return self.passes.target_losses([]).sum(), torch.zeros(2, len(names), device=self._device)
            loss, measured = make(micro_batch)
            return loss, _sums(measured, names)

        return share

    @property
    def _device(self) -> torch.device:
        return self.passes.world.device

    def _dpo(self) -> Callable[[Tensor], tuple[Tensor, Measured]]:
        def share(micro_batch: Tensor) -> tuple[Tensor, Measured]:
            places = self.data.places(micro_batch)
            logps = sequence_logps(self.passes, self.data.sequences, places)
            reference = self.reference["sequences"][places].to(self._device)
            losses, measured = dpo_losses(
                logps.view(-1, 2), reference.view(-1, 2), beta=self.settings.beta, smoothing=self.settings.smoothing
            )
            return losses.sum() / len(self.indices), measured

        return share

    def _orpo(self) -> Callable[[Tensor], tuple[Tensor, Measured]]:
        sequences, chosen = self.data.sequences, self.indices * 2
        counts = sequences.lengths - 1 if self.data.learns_prompts else sequences.target_counts
        num_targets = int(counts[chosen].sum())

        def share(micro_batch: Tensor) -> tuple[Tensor, Measured]:
            wholes, means = self._orpo_sums(micro_batch)
            losses, measured = orpo_losses(means.view(-1, 2), beta=self.settings.beta)
            measured["nll_loss"] = wholes.detach() / num_targets * len(self.indices)  # its mean is the step's
            return wholes.sum() / num_targets + losses.sum() / len(self.indices), measured

        return share

    def _orpo_sums(self, micro_batch: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropies of the chosen sequences [P], and mean log-probabilities of all answers' tokens [2 P]."""
        examples = [self.data.sequences.example(place) for place in self.data.places(micro_batch).tolist()]
        answers = [labels[1:] != MASKED_LABEL for _, labels in examples]
        if self.data.learns_prompts:
            examples[::2] = [(ids, ids) for ids, _ in examples[::2]]
        targets = [labels[1:] != MASKED_LABEL for _, labels in examples]
        parts = self.passes.target_losses(examples).split([int(own.sum()) for own in targets])
        means = [
            -part[answer[target].to(part.device)].mean()
            for part, answer, target in zip(parts, answers, targets, strict=True)
        ]
        return torch.stack([part.sum() for part in parts[::2]]), torch.stack(means)

    def _kto(self) -> Callable[[Tensor], tuple[Tensor, Measured]]:
        moved = self._measure_moved()
        weights = self.settings.desirable_weight, self.settings.undesirable_weight

        def share(micro_batch: Tensor) -> tuple[Tensor, Measured]:
            logps = sequence_logps(self.passes, self.data.sequences, micro_batch)
            reference, is_good = self.reference["sequences"][micro_batch], self.data.is_good[micro_batch]
            losses, measured = kto_losses(
                logps, reference.to(self._device), is_good.to(self._device),
                beta=self.settings.beta, moved=moved, weights=weights,
            )  # fmt: skip
            measured["kl"] = torch.full_like(losses.detach(), moved)
            return losses.sum() / len(self.indices), measured

        return share

    def _measure_moved(self) -> float:
        """How far the model is from its reference: the mean log-ratio of the step's mismatched answers, at least 0."""
        others = self.data.others
        assert others is not None
        total = 0.0
        with self.passes.measuring():
            for own in self.passes.split(self.indices, others.lengths):
                if len(own):
                    logps = sequence_logps(self.passes, others, own)
                    total += (logps - self.reference["others"][own].to(self._device)).sum().item()
                else:
                    self.passes.target_losses([])  # the other processes are in this pass
        return max(0.0, self.passes.world.sum([total])[0] / max(1, len(self.indices)))


def sequence_logps(passes: Passes, sequences: EncodedDataset, places: Tensor) -> Tensor:
    """The log-probability of each sequence's target tokens: float32 [S], differentiable."""
    losses = passes.target_losses([sequences.example(place) for place in places.tolist()])
    return -torch.stack([part.sum() for part in losses.split(sequences.target_counts[places].tolist())])


def _sums(measured: Measured, names: Sequence[str]) -> Tensor:
    sums = torch.stack([measured[name].sum() for name in names])
    return torch.stack([sums, sums.new_tensor([len(measured[name]) for name in names])])


def mean_measures(objective: str, sums: Sequence[float]) -> dict[str, float]:
    """The means by name of a step's sums and counts, one behind the other; what no example has is left out."""
    names = MEASURES.get(objective, ())
    pairs = zip(names, sums[: len(names)], sums[len(names) :], strict=True)
    means = {name: total / count for name, total, count in pairs if count}
    if objective == KTO and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def average(measures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean over several steps, by name, of those that have it."""
    listed: dict[str, list[float]] = {}
    for one in measures:
        for name, value in one.items():
            listed.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in listed.items()}

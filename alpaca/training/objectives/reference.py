"""What the model thought of every answer before its first step: log-probabilities that DPO and KTO compare with.

They are measured once, of the model as it will be trained: an adapter's first matrices change nothing yet. A
checkpoint holds them, so that a resumed run compares with the same values.
"""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from alpaca.data.examples import EncodedDataset
from alpaca.data.preferences import DPO, KTO, PreferenceDataset
from alpaca.training.model.passes import Passes
from alpaca.training.objectives.preference import sequence_logps

_NEEDED = (DPO, KTO)
_AT_ONCE = 256  # sequences that are laid out together


def measure_reference(
    objective: str, passes: Passes, parts: Mapping[str, PreferenceDataset], *, progress: bool
) -> dict[str, Tensor]:
    """Log-probabilities by "part.sequences" and "part.others": float32 on the CPU, one of each sequence.

    Empty for an objective that needs none. All processes call it together and get the same.
    """
    if objective not in _NEEDED:
        return {}
    named = {}
    for name, data in parts.items():
        named[f"{name}.sequences"] = data.sequences
        if data.others is not None:
            named[f"{name}.others"] = data.others
    total = sum(map(len, named.values()))
    seldom = {} if sys.stderr.isatty() else {"mininterval": 10.0}
    bar = tqdm(total=total, desc="reference", unit=" answers", disable=not progress, **seldom)
    with bar, passes.measuring():
        return {name: _measure(passes, sequences, bar) for name, sequences in named.items()}


def part_of(reference: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One part's values, by "sequences" and "others"."""
    return {key.partition(".")[2]: values for key, values in reference.items() if key.partition(".")[0] == name}


def _measure(passes: Passes, sequences: EncodedDataset, bar: tqdm) -> Tensor:
    values = torch.zeros(len(sequences))
    for places in sequences.lengths.argsort(stable=True).split(_AT_ONCE):
        found: list[tuple[list[int], list[float]]] = []
        for own in passes.split(places, sequences.lengths):
            if len(own):
                found.append((own.tolist(), sequence_logps(passes, sequences, own).tolist()))
            else:
                passes.target_losses([])  # the other processes are in this pass
        for process in passes.world.gather(found):
            for own, logps in process:
                values[own] = torch.tensor(logps)
        bar.update(len(places))
    return values

"""A step on its way through the engine: as it is laid out on the host, and as the network takes it."""

from dataclasses import dataclass

import torch

from alpaca.serving.kernels.low_rank import AdapterRows
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.scheduler import Work


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a forward pass computes: N packed tokens, sequence after sequence."""

    ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    slots: torch.Tensor  # [N] int64: where in the cache a token's keys and values go
    attention: AttentionBatch
    adapters: AdapterRows | None = None  # None: no row has one


class Launched:
    """A step on its way: its works, those of them that get a token, and these tokens once the device has them."""

    def __init__(self, works: list[Work], ids: torch.Tensor, ready: "torch.cuda.Event | None" = None) -> None:
        self.works = works
        self.sampled = [work for work in works if work.samples]
        self._ids = ids
        self._ready = ready

    def ids(self) -> list[int]:
        """One token for each of `sampled`. Waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._ids.tolist()


@dataclass(frozen=True)
class HostStep:
    """A step's inputs as they are laid out on the host: one row a token, one row a sequence."""

    ids: list[int]
    positions: list[int]
    slots: list[int]
    seq_lens: list[int]
    query_starts: list[int]
    state_rows: list[int]  # of last_ids, one for each sequence
    adapters: list[int]  # slots, one for each token

    @property
    def uses_adapters(self) -> bool:
        return any(self.adapters)

    @property
    def is_decode(self) -> bool:
        return len(self.ids) == len(self.seq_lens)

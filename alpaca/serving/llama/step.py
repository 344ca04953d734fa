"""The fields of a step: each is declared once here, and its forms on the host, in transfer and on the device follow.

The runner lays a step out as lists (`StepFields[list]`). `to_device` makes tensors of them, and `StepBuffers` keeps
them in memory that stays in place, as CUDA graphs need it. A field's dtype stands in its declaration only.

Legend: N packed tokens of a step, S sequences, R sequences that get a new token in it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from alpaca.serving.engine import TokenScore
from alpaca.serving.llama.scheduler import ScheduledSequence
from alpaca.serving.scoring import Scores

UNKNOWN = -1  # stands for a token id that the step before sampled and the host does not know yet

Column = TypeVar("Column")  # list on the host, torch.Tensor on the device

_INT32, _INT64, _BOOL = {"dtype": torch.int32}, {"dtype": torch.int64}, {"dtype": torch.bool}
_FLOAT32, _FLOAT64 = {"dtype": torch.float32}, {"dtype": torch.float64}


@dataclass(frozen=True, kw_only=True)
class StepFields(Generic[Column]):
    """What the network is told about a step, sequence after sequence. In each field 0 is what a padding row has."""

    # One entry for each token, [N].
    token_ids: Column = field(metadata=_INT64)
    positions: Column = field(metadata=_INT64)  # the token's row in the rotary table, by its place in its sequence
    slot_mapping: Column = field(metadata=_INT64)  # where the cache keeps the token's keys and values: its slot
    adapter_indices: Column = field(metadata=_INT32)  # 0: the base model alone
    # One entry for each sequence, [S].
    state_rows: Column = field(metadata=_INT64)  # the sequence's row of the runner's state; row 0 is for padding
    seq_lens: Column = field(metadata=_INT32)  # tokens in the cache after this step
    query_lens: Column = field(metadata=_INT32)  # tokens in this step


@dataclass(frozen=True, kw_only=True)
class SamplingFields(Generic[Column]):
    """How the new token of each sequence is sampled, [R]. A padding row, all 0, takes the most likely token."""

    temperature: Column = field(metadata=_FLOAT32)  # 0: the most likely token
    top_k: Column = field(metadata=_INT64)  # 0: off
    top_p: Column = field(metadata=_FLOAT32)  # 1: off
    min_p: Column = field(metadata=_FLOAT32)  # 0: off
    uniform: Column = field(metadata=_FLOAT64)  # in [0, 1): decides the draw
    must_go_on: Column = field(metadata=_BOOL)  # no EOS may be sampled yet


Fields = TypeVar("Fields", StepFields, SamplingFields)


def to_device(fields: Fields, device: torch.device) -> Fields:
    """The same fields as tensors on the device. The host does not wait for the work queued there."""
    return type(fields)(
        **{
            column.name: to_tensor(getattr(fields, column.name), column.metadata["dtype"], device)
            for column in dataclasses.fields(fields)
        }
    )


def to_tensor(values: Sequence | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values of the host as a tensor on the device. The host does not wait for the work queued there."""
    if device.type == "cpu":
        return torch.as_tensor(values, dtype=dtype)
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


class StepBuffers:
    """Memory for a decode step of up to `max_rows` sequences: all fields in one piece, and the block tables.

    One copy moves all fields of a step from the host's (pinned) buffers to the device's.

    max_blocks: most blocks of one sequence.
    """

    def __init__(
        self, max_rows: int, max_blocks: int, *, device: torch.device | None = None, pin: bool = False
    ) -> None:
        dtypes = _dtypes()
        num_bytes = sum(_aligned(max_rows * dtype.itemsize) for dtype in dtypes.values())
        self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device, pin_memory=pin)
        self.block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device, pin_memory=pin)
        self._columns: dict[str, torch.Tensor] = {}
        start = 0
        for name, dtype in dtypes.items():
            self._columns[name] = self._bytes[start : start + max_rows * dtype.itemsize].view(dtype)
            start += _aligned(max_rows * dtype.itemsize)

    def view(self, fields: type[Fields], num_rows: int) -> Fields:
        """The first `num_rows` rows of each field, as tensors that share this memory."""
        return fields(**{column.name: self._columns[column.name][:num_rows] for column in dataclasses.fields(fields)})

    def write(self, fields: StepFields[list] | SamplingFields[list], num_rows: int) -> None:
        """Write fields into buffers on the host, and zeros into the padding rows behind them up to `num_rows`."""
        for name, values in vars(fields).items():
            column = self._columns[name].numpy()
            column[: len(values)] = values
            column[len(values) : num_rows] = 0

    def write_block_tables(self, block_tables: np.ndarray) -> None:
        """Write the sequences' blocks [S, P] into buffers on the host. What stands beyond them is never read."""
        self.block_tables.numpy()[: len(block_tables), : block_tables.shape[1]] = block_tables

    def copy_from(self, other: "StepBuffers", num_rows: int) -> None:
        """Take over all fields of equally large buffers and `num_rows` block tables. The host does not wait."""
        self._bytes.copy_(other._bytes, non_blocking=True)
        self.block_tables[:num_rows].copy_(other.block_tables[:num_rows], non_blocking=True)


def _dtypes() -> dict[str, torch.dtype]:
    """The dtype of every field, by its name."""
    columns = (*dataclasses.fields(StepFields), *dataclasses.fields(SamplingFields))
    return {column.name: column.metadata["dtype"] for column in columns}


def _aligned(num_bytes: int) -> int:
    """So many bytes, rounded up so that a view of any dtype may follow."""
    return -(-num_bytes // 16) * 16


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """Scores of a step's tokens, on the host once the step is done.

    prompts: each sequence whose prompt tokens were scored, with their number; their scores lie one after the other.
    rows: the sequences whose new tokens were scored, by their places among those sampled, with the scores.
    """

    prompts: Sequence[tuple[ScheduledSequence, int]] = ()
    prompt_scores: Scores | None = None
    rows: Sequence[int] = ()
    row_scores: Scores | None = None

    def read_prompts(self) -> Iterator[tuple[ScheduledSequence, list[TokenScore]]]:
        """Each sequence's scores of its prompt tokens."""
        scores = iter(self.prompt_scores.read() if self.prompt_scores else ())
        for item, count in self.prompts:
            yield item, list(itertools.islice(scores, count))

    def read_rows(self) -> dict[int, TokenScore]:
        """The scores of new tokens, by their sequences' places among those sampled."""
        return dict(zip(self.rows, self.row_scores.read(), strict=True)) if self.row_scores else {}

    def to_host(self) -> "StepScores":
        """Begin to copy them to the host."""
        return dataclasses.replace(
            self,
            prompt_scores=self.prompt_scores and self.prompt_scores.to_host(),
            row_scores=self.row_scores and self.row_scores.to_host(),
        )


class PendingStep:
    """A launched step, whose new tokens the device may still be computing.

    scheduled: the step's sequences, in the order of its rows; sampled: those of them that get a token, [R].
    scores: of the tokens that were to be scored, if any were.
    """

    def __init__(
        self,
        scheduled: list[ScheduledSequence],
        token_ids: torch.Tensor,
        ready: "torch.cuda.Event | None" = None,
        scores: StepScores | None = None,
    ) -> None:
        self.scheduled = scheduled
        self.sampled = [item for item in scheduled if item.samples_token]
        self.scores = scores
        self._token_ids = token_ids
        self._ready = ready

    def wait(self) -> list[int]:
        """Wait for the device; returns one token id for each of `sampled`. Raises what the step failed with there."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._token_ids.tolist()
